"""Asks about health through grpcio's own package, and watches it until the service has stopped.

Says "watching" when it does, and a line that begins with "ok" when the service has told of its end.

usage: health.py HOST:PORT
"""

import sys

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

KNOWN = ("", "builder.v1.BuilderService")
STATUS = pb.HealthCheckResponse
SECONDS_MAX = 60


def asked(service):
    return pb.HealthCheckRequest(service=service)


def refused(call):
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND, error
        return
    raise AssertionError("expected NOT_FOUND")


def main():
    with grpc.insecure_channel(sys.argv[1]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in KNOWN:
            assert stub.Check(asked(service)).status == STATUS.SERVING, service
        refused(lambda: stub.Check(asked("another.v1.Service")))
        watched = [stub.Watch(asked(service), timeout=SECONDS_MAX) for service in KNOWN]
        for service, told in zip(KNOWN, watched):
            assert next(told).status == STATUS.SERVING, service
        print("watching", flush=True)
        for service, told in zip(KNOWN, watched):
            rest = [answer.status for answer in told]
            assert rest == [STATUS.NOT_SERVING], (service, rest)
            assert told.code() == grpc.StatusCode.OK, told.code()
    print("ok grpcio-health-checking: serving, not serving, end")


main()
