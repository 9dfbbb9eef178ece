//! Other people's clients: installed once below `target/clients`, in pinned versions, with code
//! generated from the public proto files by their own generators.
//!
//! Their programs are `xtask/clients/`. Knows no service.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::process::Program;
use crate::workspace;

/// What the Node.js client is made of.
const NODE_FILES: &[&str] = &[
    "package.json",
    "package-lock.json",
    "buf.gen.yaml",
    "client.mjs",
    "browser.mjs",
    "page.html",
    "page.mjs",
];

fn source(name: &str) -> PathBuf {
    workspace::top().join("xtask/clients").join(name)
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Runs `install` in an empty directory unless one stands there that was made from the same text.
fn installed(
    name: &str,
    wanted: &str,
    install: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let dir = workspace::kept("clients")?.join(name);
    let stamp = dir.join("stamp");
    if std::fs::read_to_string(&stamp).is_ok_and(|text| text == wanted) {
        return Ok(dir);
    }
    if dir.exists() {
        std::fs::remove_dir_all(&dir)?;
    }
    std::fs::create_dir_all(&dir)?;
    eprintln!("installing the {name} clients into {}", dir.display());
    install(&dir)?;
    std::fs::write(stamp, wanted)?;
    Ok(dir)
}

/// A virtual environment with grpcio, moto, py-spiffe and rotel.
pub(crate) fn python() -> Result<PathBuf> {
    let requirements = source("python/requirements.txt");
    installed("python", &read(&requirements)?, |dir| {
        Program::new("python3").args(["-m", "venv"]).arg(dir).run()?;
        Program::new(dir.join("bin/pip"))
            .args(["install", "--quiet", "--disable-pip-version-check", "--requirement"])
            .arg(&requirements)
            .run()
    })
}

/// A stand-in for Google Cloud Storage, not yet told where to be.
pub(crate) fn google() -> Result<Program> {
    let program = Program::new(python()?.join("bin/python")).arg(source("python/gcs_stand_in.py"));
    Ok(program.env("PYTHONDONTWRITEBYTECODE", "1"))
}

/// An agent that gives out SPIFFE identities, and clients that have theirs from it; not yet told
/// where to be.
pub(crate) fn spiffe() -> Result<Program> {
    let program = Program::new(python()?.join("bin/python")).arg(source("spiffe/agent.py"));
    Ok(program.env("PYTHONDONTWRITEBYTECODE", "1"))
}

/// A collector of telemetry, not yet told where to listen: rotel, which takes OTLP and hands it on.
pub(crate) fn collector() -> Result<Program> {
    let python = python()?.join("bin/python");
    let place = "from importlib.util import find_spec\n\
                 print(find_spec('rotel').submodule_search_locations[0])";
    let place = PathBuf::from(Program::new(python).args(["-c", place]).text()?);
    Ok(Program::new(place.join("rotel-agent")).arg("start"))
}

/// What takes what a collector hands on, not yet told where to listen.
pub(crate) fn otlp() -> Result<Program> {
    let program = Program::new(python()?.join("bin/python")).arg(source("python/otlp.py"));
    Ok(program.env("PYTHONDONTWRITEBYTECODE", "1"))
}

/// Who watches a service's health through grpcio, not yet told whose.
pub(crate) fn watcher() -> Result<Program> {
    let program = Program::new(python()?.join("bin/python")).arg(source("python/health.py"));
    Ok(program.env("PYTHONDONTWRITEBYTECODE", "1"))
}

/// A directory with buf, connect-node, connect-web and the generated client.
pub(crate) fn node() -> Result<PathBuf> {
    let lock = read(&source("node/package-lock.json"))?;
    let dir = installed("node", &lock, |dir| {
        for name in NODE_FILES {
            std::fs::copy(source("node").join(name), dir.join(name))?;
        }
        let options = ["ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"];
        Program::new("npm").args(options).dir(dir).run()
    })?;
    for name in NODE_FILES {
        std::fs::copy(source("node").join(name), dir.join(name))?;
    }
    let script = "PATH=\"$PWD/node_modules/.bin:$PATH\" exec \"$0\" generate \"$1\"";
    let buf = buf_below(&dir)?;
    Program::shell(script).arg(buf).arg(workspace::top().join("proto")).dir(&dir).run()?;
    Ok(dir)
}

/// The program `buf`; it is a Go client and knows our proto files by reflection alone.
pub(crate) fn buf() -> Result<PathBuf> {
    buf_below(&node()?)
}

/// npm installs the one for this machine. The package `@bufbuild/buf` that would choose it asks for
/// every platform's, which not every mirror has, and starts it through Node.js.
fn buf_below(dir: &Path) -> Result<PathBuf> {
    let packages = dir.join("node_modules/@bufbuild");
    for package in std::fs::read_dir(&packages)? {
        let package = package?;
        let program = package.path().join("bin/buf");
        if package.file_name().to_string_lossy().starts_with("buf-") && program.exists() {
            return Ok(program);
        }
    }
    bail!("{} holds no buf for this machine", packages.display())
}

/// The Python client's program with its generated code, not yet told whom to call.
pub(crate) fn python_client() -> Result<Program> {
    let dir = python()?;
    let generated = dir.join("generated");
    std::fs::create_dir_all(&generated)?;
    let out = |kind: &str| format!("--{kind}={}", generated.display());
    Program::new(dir.join("bin/python"))
        .args(["-m", "grpc_tools.protoc", "builder/v1/builder.proto"])
        .arg(format!("--proto_path={}", workspace::top().join("proto").display()))
        .args([out("python_out"), out("grpc_python_out")])
        .run()?;
    let client = Program::new(dir.join("bin/python")).arg(source("python/client.py"));
    Ok(client.env("PYTHONPATH", generated).env("PYTHONDONTWRITEBYTECODE", "1"))
}
