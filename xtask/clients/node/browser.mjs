// Two origins with the same page, and Chromium to open it: one origin may call the service, the
// other may not. Says what the pages say; fails when one says too little for too long.
//
// usage: node browser.mjs http://HOST:PORT IMAGE ALLOWED_PORT OTHER_PORT EMPTY_DIRECTORY

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdir, readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, normalize } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

const [service, image, allowedPort, otherPort, directory] = process.argv.slice(2);
assert(directory, "usage: node browser.mjs URL IMAGE ALLOWED_PORT OTHER_PORT EMPTY_DIRECTORY");

const PAGE_SECS_MAX = 120;
const END_SECS_MAX = 5;
const TYPES = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript" };
const FLAGS = [
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-dev-shm-usage",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

async function textOf(request) {
  let text = "";
  for await (const piece of request.setEncoding("utf8")) text += piece;
  return text;
}

async function answer(request, response, tell) {
  if (request.method === "POST") {
    tell(await textOf(request));
    response.writeHead(204).end();
    return;
  }
  const path = normalize(new URL(request.url, "http://page").pathname);
  const file = await readFile(join(".", path)).catch(() => null);
  const type = TYPES[extname(path)];
  if (file && type) response.writeHead(200, { "Content-Type": type }).end(file);
  else response.writeHead(404).end();
}

async function browse(url, home, ended) {
  await mkdir(home);
  const profile = `--user-data-dir=${join(home, "profile")}`;
  // A group of its own, which ends as a whole; and it must not outlive us, however we end.
  const options = ["--pdeathsig", "KILL", "chromium", ...FLAGS, profile, url];
  const chromium = spawn("setpriv", options, {
    detached: true,
    stdio: ["ignore", "ignore", "pipe"],
    env: { ...process.env, HOME: home, TMPDIR: home },
  });
  const exit = once(chromium, "exit");
  const said = textOf(chromium.stderr);
  const first = await Promise.race([
    ended.then(() => null),
    exit.then(([code, signal]) => `Chromium ended with ${code ?? signal}`),
    sleep(PAGE_SECS_MAX * 1000, `${url} did not end within ${PAGE_SECS_MAX} s`, { ref: false }),
  ]);
  chromium.kill("SIGTERM");
  await Promise.race([exit, sleep(END_SECS_MAX * 1000, null, { ref: false })]);
  try {
    process.kill(-chromium.pid, "SIGKILL");
  } catch (error) {
    assert.equal(error.code, "ESRCH");
  }
  if (first) throw new Error(`${first}; it said:\n${await said}`);
}

async function visit(port, allowed) {
  let end;
  const ended = new Promise((resolve) => (end = resolve));
  const tell = (line) => (line === "end" ? end() : console.log(line));
  const server = createServer((request, response) => answer(request, response, tell));
  server.listen(Number(port), "127.0.0.1");
  await once(server, "listening");
  const query = new URLSearchParams({ service, image, allowed });
  await browse(`http://127.0.0.1:${port}/page.html?${query}`, join(directory, port), ended);
  server.closeAllConnections();
  server.close();
}

await visit(allowedPort, true);
await visit(otherPort, false);
