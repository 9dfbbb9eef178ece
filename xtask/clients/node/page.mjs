// What a page in a browser does with builderd. As one whose origin is allowed: a build's life
// through every transport of connect-web, and a download. As any other: it learns nothing.
//
// Tells its own server one line for each thing, then "end".
//
// usage: page.html?service=http://HOST:PORT&image=IMAGE&allowed=true

import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createConnectTransport, createGrpcWebTransport } from "@connectrpc/connect-web";
import {
  BuilderService,
  BuildState,
  InitStrategy,
  TenantTier,
} from "./generated/builder/v1/builder_pb.js";

const query = new URLSearchParams(location.search);
const [baseUrl, image] = [query.get("service"), query.get("image")];

const transports = {
  "connect-json": (more) => createConnectTransport({ baseUrl, ...more }),
  "connect-proto": (more) => createConnectTransport({ baseUrl, useBinaryFormat: true, ...more }),
  "connect-get": (more) => createConnectTransport({ baseUrl, useHttpGet: true, ...more }),
  "grpc-web-proto": (more) => createGrpcWebTransport({ baseUrl, ...more }),
  "grpc-web-json": (more) => createGrpcWebTransport({ baseUrl, useBinaryFormat: false, ...more }),
};

const report = (line) => fetch("/report", { method: "POST", body: line });

function assert(holds, what) {
  if (!holds) throw new Error(what);
}

function clientOf(make, tenant) {
  const identify = (next) => (request) => {
    request.header.set("X-Tenant-ID", tenant);
    return next(request);
  };
  return createClient(BuilderService, make({ interceptors: [identify] }));
}

function order(tenantId) {
  return {
    config: {
      tenant: { tenantId, tier: TenantTier.PRO },
      source: { sourceType: { case: "dockerImage", value: { imageUri: image } } },
      target: {
        targetType: { case: "microvmRootfs", value: { initStrategy: InitStrategy.DIRECT } },
      },
      strategy: { strategyType: { case: "dockerExtract", value: {} } },
      labels: { "ünïcode": "✓" },
    },
  };
}

async function errorOf(call) {
  const answered = await call.then(() => true, (reason) => ConnectError.from(reason));
  assert(answered !== true, "a call was answered that should not be");
  return answered;
}

async function oneLife(tenantId, make) {
  const client = clientOf(make, tenantId);
  let headers;
  const { buildId } = await client.createBuild(order(tenantId), {
    onHeader: (found) => (headers = found),
  });
  // A page sees such headers only if the service says that it may.
  assert(Number(headers.get("x-ratelimit-limit")) > 0, "no X-RateLimit-Limit");
  let count = 0n;
  let last;
  for await (const line of client.streamBuildLogs({ buildId, follow: true })) {
    assert(line.offset === count, `line ${count} of the log is numbered ${line.offset}`);
    count += 1n;
    last = line.message;
  }
  assert(/^completed: \d+ bytes/.test(last), `the log ends with ${last}`);
  const { build } = await client.getBuild({ buildId, tenantId });
  assert(build.state === BuildState.COMPLETED, `it ended as ${BuildState[build.state]}`);
  assert(build.config.labels["ünïcode"] === "✓", "its label is not whole");
  const missing = await errorOf(client.getBuild({ buildId: "build_00000000000000000000000000" }));
  assert(missing.code === Code.NotFound, `no such build: ${missing}`);
  await download(tenantId, build);
  return `${count} lines`;
}

async function download(tenant, build) {
  const url = `${baseUrl}/builder.v1.BuilderService/GetBuildArtifact/${build.buildId}`;
  const etag = `"${build.rootfsChecksum}"`;
  const headers = { "X-Tenant-ID": tenant, Range: "bytes=1024-2047", "If-Range": etag };
  const answer = await fetch(url, { headers });
  const bytes = new Uint8Array(await answer.arrayBuffer());
  const length = `bytes 1024-2047/${build.rootfsSizeBytes}`;
  assert(answer.status === 206 && bytes.length === 1024, `a range: ${answer.status}`);
  assert(answer.headers.get("content-range") === length, answer.headers.get("content-range"));
  assert(answer.headers.get("etag") === etag, `the ETag is ${answer.headers.get("etag")}`);
  // The magic number of ext4's superblock.
  assert(bytes[0x38] === 0x53 && bytes[0x39] === 0xef, "what came is no ext4");
}

async function outside(tenantId, make) {
  const refused = await errorOf(clientOf(make, tenantId).createBuild(order(tenantId)));
  assert(refused.code === Code.Unknown, `CreateBuild: ${refused}`);
  assert(refused.cause instanceof TypeError, `CreateBuild: ${refused}`);
  // It is there, and answers: the browser keeps the answer to itself.
  const opaque = await fetch(`${baseUrl}/health`, { mode: "no-cors" });
  assert(opaque.type === "opaque", `without CORS an answer is ${opaque.type}`);
  const health = await errorOf(fetch(`${baseUrl}/health`));
  assert(health.cause instanceof TypeError, `/health: ${health}`);
  return `refused: ${refused.rawMessage}`;
}

const [story, prefix] = query.get("allowed") === "true" ? [oneLife, "web"] : [outside, "stranger"];
for (const [name, make] of Object.entries(transports)) {
  const said = story(`${prefix}-${name}`, make).then(
    (what) => `ok ${prefix}, ${name}: ${what}`,
    (error) => `failed ${prefix}, ${name}: ${error.stack ?? error}`,
  );
  await report(await said);
}
await report("end");
