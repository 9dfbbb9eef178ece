// One life of a build through every transport of connect-node: create, follow, get, list, cancel
// another one, look at quotas and figures, delete. Says one line for each transport.
//
// usage: node client.mjs http://HOST:PORT IMAGE SLOW_IMAGE

import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import {
  createConnectTransport,
  createGrpcTransport,
  createGrpcWebTransport,
} from "@connectrpc/connect-node";
import {
  BuilderService,
  BuildState,
  InitStrategy,
  TenantTier,
} from "./generated/builder/v1/builder_pb.js";

const [baseUrl, image, slowImage] = process.argv.slice(2);
assert(slowImage, "usage: node client.mjs http://HOST:PORT IMAGE SLOW_IMAGE");

const transports = [];
for (const useBinaryFormat of [true, false]) {
  const format = useBinaryFormat ? "proto" : "json";
  for (const httpVersion of ["1.1", "2"]) {
    const options = { baseUrl, httpVersion, useBinaryFormat };
    const name = (protocol) => `${protocol}-${format}-http${httpVersion.replace(".", "")}`;
    transports.push([name("connect"), (more) => createConnectTransport({ ...options, ...more })]);
    transports.push([
      name("connect-get"),
      (more) => createConnectTransport({ ...options, ...more, useHttpGet: true }),
    ]);
    transports.push([name("grpc-web"), (more) => createGrpcWebTransport({ ...options, ...more })]);
  }
  transports.push([
    `grpc-${format}-http2`,
    (more) => createGrpcTransport({ baseUrl, useBinaryFormat, ...more }),
  ]);
}

function config(tenantId, imageUri) {
  return {
    tenant: { tenantId, tier: TenantTier.ENTERPRISE },
    source: { sourceType: { case: "dockerImage", value: { imageUri } } },
    target: {
      targetType: { case: "microvmRootfs", value: { initStrategy: InitStrategy.DIRECT } },
    },
    strategy: { strategyType: { case: "dockerExtract", value: { flattenFilesystem: true } } },
    buildName: "from connect-node",
    labels: { language: "javascript", "ünïcode": "✓" },
  };
}

async function refused(call, code, words) {
  const error = await call.then(
    () => assert.fail(`expected ${Code[code]}`),
    (reason) => ConnectError.from(reason),
  );
  assert.equal(Code[error.code], Code[code], error.message);
  assert(error.rawMessage.includes(words), `${error.rawMessage} does not say ${words}`);
}

async function createAndFollow(client, tenantId) {
  const created = await client.createBuild({ config: config(tenantId, image) });
  assert.match(created.buildId, /^build_[0-9A-Z]{26}$/);
  assert(created.createdAt, "createdAt");
  let count = 0n;
  let last;
  for await (const line of client.streamBuildLogs({ buildId: created.buildId, follow: true })) {
    assert.equal(line.offset, count, "lines are numbered without a gap");
    count += 1n;
    last = line;
  }
  assert.match(last.message, /^completed: \d+ bytes/);
  return [created.buildId, count];
}

async function look(client, tenantId, buildId, lines) {
  const { build } = await client.getBuild({ buildId, tenantId });
  assert.equal(BuildState[build.state], "COMPLETED", build.errorMessage);
  assert.equal(build.progressPercent, 100);
  assert.match(build.rootfsChecksum, /^[0-9a-f]{64}$/);
  assert(build.rootfsSizeBytes > 0n && build.metrics.totalDurationMs >= 0n);
  assert.equal(build.config.labels["ünïcode"], "✓");
  assert.equal(build.config.source.sourceType.value.imageUri, image);
  assert.match(build.imageMetadata.imageDigest, /^sha256:[0-9a-f]{64}$/);
  assert(build.buildLogs.length > 0 && BigInt(build.buildLogs.length) <= lines);
  const list = await client.listBuilds({ tenantId, pageSize: 10 });
  assert.deepEqual(list.builds.map((one) => one.buildId), [buildId]);
  assert.equal(list.totalCount, 1);
  return build;
}

async function cancelAnother(client, tenantId) {
  const { buildId } = await client.createBuild({ config: config(tenantId, slowImage) });
  const state = async () => (await client.getBuild({ buildId })).build.state;
  while ((await state()) !== BuildState.EXTRACTING) await sleep(100);
  const started = performance.now();
  assert((await client.cancelBuild({ buildId, tenantId, reason: "a test" })).success);
  while ((await state()) !== BuildState.CANCELLED) await sleep(50);
  const took = performance.now() - started;
  assert(took < 1500, `cancelling took ${took} ms`);
  return buildId;
}

async function oneLife(tenantId, transport) {
  const client = createClient(BuilderService, transport);
  const [buildId, lines] = await createAndFollow(client, tenantId);
  const build = await look(client, tenantId, buildId, lines);
  const cancelled = await cancelAnother(client, tenantId);
  const quotas = await client.getTenantQuotas({ tenantId });
  assert.equal(quotas.currentLimits.maxConcurrentBuilds, 10);
  assert.equal(quotas.currentUsage.dailyBuildsUsed, 2);
  assert.equal(quotas.currentUsage.activeBuilds, 0);
  assert.equal(quotas.currentUsage.storageBytesUsed, build.rootfsSizeBytes);
  const stats = await client.getBuildStats({ tenantId });
  assert.equal(stats.totalBuilds, 2);
  assert.equal(stats.successfulBuilds, 1);
  await refused(client.createBuild({}), Code.InvalidArgument, "build config is required");
  await refused(client.getBuild({ buildId, tenantId: "another" }), Code.PermissionDenied, "");
  for (const id of [buildId, cancelled]) {
    assert((await client.deleteBuild({ buildId: id, tenantId })).success);
    await refused(client.getBuild({ buildId: id }), Code.NotFound, "build not found");
  }
  return lines;
}

for (const [name, make] of transports) {
  const tenant = `node-${name}`;
  const identify = (next) => (request) => {
    request.header.set("X-Tenant-ID", tenant);
    return next(request);
  };
  const lines = await oneLife(tenant, make({ interceptors: [identify] }));
  console.log(`ok ${name}: ${lines} lines`);
}
// Connections that are kept for a next request would keep the process.
process.exit(0);
