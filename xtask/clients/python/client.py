"""One life of a build through grpcio: create, follow, get, list, cancel another one, look at
quotas and figures, delete; then compression and deadlines.

usage: client.py HOST:PORT IMAGE SLOW_IMAGE
"""

import re
import sys
import time

import grpc
from builder.v1 import builder_pb2 as pb
from builder.v1 import builder_pb2_grpc

TENANT = "python-grpc"
METADATA = (("x-tenant-id", TENANT), ("x-customer-id", "customer-1"))


def config(image):
    return pb.BuildConfig(
        tenant=pb.TenantContext(tenant_id=TENANT, tier=pb.TENANT_TIER_ENTERPRISE),
        source=pb.BuildSource(docker_image=pb.DockerImageSource(image_uri=image)),
        target=pb.BuildTarget(
            microvm_rootfs=pb.MicroVMRootfs(init_strategy=pb.INIT_STRATEGY_DIRECT)
        ),
        strategy=pb.BuildStrategy(docker_extract=pb.DockerExtractStrategy()),
        build_name="from grpcio",
        labels={"language": "python"},
    )


class Client:
    def __init__(self, channel):
        self.stub = builder_pb2_grpc.BuilderServiceStub(channel)

    def __getattr__(self, method):
        """Every call carries who asks."""
        rpc = getattr(self.stub, method)
        return lambda message, **more: rpc(message, metadata=METADATA, **more)

    def state(self, build_id):
        return self.GetBuild(pb.GetBuildRequest(build_id=build_id)).build.state


def refused(call, code, words):
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() == code, f"{error.code()}: {error.details()}"
        assert words in error.details(), error.details()
        return error
    raise AssertionError(f"expected {code}")


def create_and_follow(client, image):
    created = client.CreateBuild(pb.CreateBuildRequest(config=config(image)))
    assert re.fullmatch(r"build_[0-9A-Z]{26}", created.build_id), created.build_id
    request = pb.StreamBuildLogsRequest(build_id=created.build_id, follow=True)
    lines = list(client.StreamBuildLogs(request))
    assert [line.offset for line in lines] == list(range(len(lines)))
    assert re.match(r"completed: \d+ bytes", lines[-1].message), lines[-1]
    # Whoever was cut goes on behind the last line it has.
    request.offset = len(lines) - 1
    assert list(client.StreamBuildLogs(request)) == lines[-1:]
    return created.build_id, len(lines)


def look(client, build_id, image):
    build = client.GetBuild(pb.GetBuildRequest(build_id=build_id, tenant_id=TENANT)).build
    assert build.state == pb.BUILD_STATE_COMPLETED, build
    assert re.fullmatch(r"[0-9a-f]{64}", build.rootfs_checksum)
    assert build.rootfs_size_bytes > 0 and build.progress_percent == 100
    assert build.config.source.docker_image.image_uri == image
    assert build.config.labels == {"language": "python"}
    page = client.ListBuilds(pb.ListBuildsRequest(tenant_id=TENANT, page_size=10))
    assert [one.build_id for one in page.builds] == [build_id] and page.total_count == 1
    return build


def cancel_another(client, image):
    build_id = client.CreateBuild(pb.CreateBuildRequest(config=config(image))).build_id
    while client.state(build_id) != pb.BUILD_STATE_EXTRACTING:
        time.sleep(0.1)
    started = time.monotonic()
    assert client.CancelBuild(pb.CancelBuildRequest(build_id=build_id, reason="a test")).success
    while client.state(build_id) != pb.BUILD_STATE_CANCELLED:
        time.sleep(0.05)
    took = time.monotonic() - started
    assert took < 1.5, f"cancelling took {took} s"
    return build_id


def figures(client, build):
    quotas = client.GetTenantQuotas(pb.GetTenantQuotasRequest(tenant_id=TENANT))
    assert quotas.current_limits.max_concurrent_builds == 10, quotas
    assert quotas.current_usage.daily_builds_used == 2, quotas
    assert quotas.current_usage.storage_bytes_used == build.rootfs_size_bytes, quotas
    stats = client.GetBuildStats(pb.GetBuildStatsRequest(tenant_id=TENANT))
    assert (stats.total_builds, stats.successful_builds) == (2, 1), stats


def errors(client, build_id, slow_id):
    status = grpc.StatusCode
    empty = pb.CreateBuildRequest()
    refused(lambda: client.CreateBuild(empty), status.INVALID_ARGUMENT, "config is required")
    foreign = pb.GetBuildRequest(build_id=build_id, tenant_id="another")
    refused(lambda: client.GetBuild(foreign), status.PERMISSION_DENIED, "")
    git = config("x")
    git.source.git_repository.repository_url = "https://example.com/x.git"
    request = pb.CreateBuildRequest(config=git)
    refused(lambda: client.CreateBuild(request), status.UNIMPLEMENTED, "git")
    for one in (build_id, slow_id):
        assert client.DeleteBuild(pb.DeleteBuildRequest(build_id=one)).success
        gone = pb.GetBuildRequest(build_id=one)
        refused(lambda: client.GetBuild(gone), status.NOT_FOUND, "build not found")


def surroundings(address):
    """A compressed call."""
    with grpc.insecure_channel(address, compression=grpc.Compression.Gzip) as compressed:
        Client(compressed).ListBuilds(pb.ListBuildsRequest(tenant_id=TENANT), timeout=10)


def main():
    address, image, slow_image = sys.argv[1:]
    with grpc.insecure_channel(address) as channel:
        client = Client(channel)
        build_id, lines = create_and_follow(client, image)
        build = look(client, build_id, image)
        slow_id = cancel_another(client, slow_image)
        figures(client, build)
        errors(client, build_id, slow_id)
        surroundings(address)
    print(f"ok grpcio: {lines} lines")


main()
