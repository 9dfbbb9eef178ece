"""Takes what a collector hands on (OTLP over gRPC) and says one line of JSON for each span and metric.

usage: otlp.py PORT
"""

import json
import sys
import threading
from concurrent import futures

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc


def attributes(pairs):
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


# Spans and metrics come at once, each in a thread of its own; print() is two writes.
one_line_at_a_time = threading.Lock()


def say(**line):
    with one_line_at_a_time:
        print(json.dumps(line, default=str), flush=True)


def flat(resources, scopes, items):
    """What lies in each scope of each resource, and whose it is."""
    for resource in resources:
        service = attributes(resource.resource.attributes)
        for scope in getattr(resource, scopes):
            for item in getattr(scope, items):
                yield item, service


class Traces(trace_grpc.TraceServiceServicer):
    def Export(self, request, context):
        for span, service in flat(request.resource_spans, "scope_spans", "spans"):
            say(
                span=span.name,
                server=span.kind == span.SPAN_KIND_SERVER,
                trace=span.trace_id.hex(),
                id=span.span_id.hex(),
                parent=span.parent_span_id.hex(),
                nanos=span.end_time_unix_nano - span.start_time_unix_nano,
                attributes=attributes(span.attributes),
                service=service,
            )
        return trace_pb.ExportTraceServiceResponse()


class Metrics(metrics_grpc.MetricsServiceServicer):
    def Export(self, request, context):
        for metric, service in flat(request.resource_metrics, "scope_metrics", "metrics"):
            kind = metric.WhichOneof("data")
            points = [
                {
                    "attributes": attributes(point.attributes),
                    "value": point.count if kind == "histogram"
                    else getattr(point, point.WhichOneof("value")),
                }
                for point in getattr(metric, kind).data_points
            ]
            say(metric=metric.name, kind=kind, points=points, service=service)
        return metrics_pb.ExportMetricsServiceResponse()


def main():
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    trace_grpc.add_TraceServiceServicer_to_server(Traces(), server)
    metrics_grpc.add_MetricsServiceServicer_to_server(Metrics(), server)
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    server.start()
    server.wait_for_termination()


main()
