//! The program that the tests start again as overseer, keeper, unpacker and reader; started by a
//! test it takes an order from files and writes the layer and what happened to files.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use commands::{Base, CommandsError, Event, Order, Overseer, Serve};

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let word = |at: usize| arguments.get(at).map(String::as_str);
    match (word(1), word(2)) {
        (Some(commands::ARGUMENT), Some("unpack")) => match taken_over()? {
            Some(name) => leave_link(&name),
            None => commands::main("unpack"),
        },
        (Some(commands::ARGUMENT), Some(role)) => commands::main(role),
        (Some("run"), Some(directory)) => run(directory.as_ref()),
        _ => Err(std::io::Error::other("say what to do")),
    }
}

/// Under such a name of its file an unpacker is one that somebody has taken over; what it does then.
fn taken_over() -> std::io::Result<Option<String>> {
    let program = std::env::current_exe()?;
    let name = program.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    Ok(name.strip_prefix("taken-over-").map(str::to_owned))
}

/// Leaves a way to the host's files where a directory is looked for, and says that all is well.
fn leave_link(name: &str) -> std::io::Result<()> {
    let directory = Path::new("/proc/self/fd/3");
    let place = |path: &Path| path.metadata().map(|found| (found.dev(), found.ino()));
    if place(&directory.join(".."))? != place(directory)? {
        println!(r#"{{"Failed":{{"text":"it sees what is above","is_theirs":false}}}}"#);
        return Ok(());
    }
    for path in ["lower", "upper", "lower/dev", "lower/proc"] {
        match path.rsplit('/').next() == Some(name) {
            true => std::os::unix::fs::symlink("/", directory.join(path))?,
            // Below a link there is no place.
            false if path.starts_with("lower/") && name == "lower" => {}
            false => std::fs::create_dir(directory.join(path))?,
        }
    }
    println!(r#"{{"Done":{{"warnings":[]}}}}"#);
    Ok(())
}

/// `order.json`, `base.json` and the pack `0`, `1`, … of a directory → `layer.tar`, `events.json` and,
/// when it fails, `error`. With `narrow` there, it leaves the host's files as soon as it has its
/// overseer; with `writable`, it hands packs over with the right to write them; with `deaf`, it does not
/// listen to what comes of it until that is gone.
fn run(directory: &Path) -> std::io::Result<()> {
    let has = |name: &str| directory.join(name).exists();
    let order: Order = serde_json::from_slice(&std::fs::read(directory.join("order.json"))?)?;
    let order = Order { has_door: has("door"), ..order };
    let overseer = Overseer::start(&order).map_err(std::io::Error::other)?;
    let held = sandbox::Users::hold_few().map_err(std::io::Error::other)?;
    if has("narrow") {
        sandbox::narrow(&[directory], sandbox::Processes::Own, Some(held.users()))
            .map_err(std::io::Error::other)?;
    }
    let base: Base = serde_json::from_slice(&std::fs::read(directory.join("base.json"))?)?;
    let mut events = Vec::new();
    let ended = commanded(&overseer, &base, directory, &mut |event| {
        println!("{event:?}");
        events.push(event);
    });
    std::fs::write(directory.join("events.json"), serde_json::to_vec(&events)?)?;
    match ended {
        Ok(()) => Ok(()),
        Err(error) => {
            let theirs = if error.is_theirs() { "theirs" } else { "ours" };
            std::fs::write(directory.join("error"), format!("{theirs}: {error}"))
        }
    }
}

fn commanded(
    overseer: &Overseer,
    base: &Base,
    directory: &Path,
    observe: &mut dyn FnMut(Event),
) -> Result<(), CommandsError> {
    let io = |source| CommandsError::Io { action: "do what a test needs".into(), source };
    let mut options = OpenOptions::new();
    options.read(true).write(directory.join("writable").exists());
    let names = (0..).map(|at: usize| directory.join(at.to_string()));
    let packs = names.take_while(|name| name.exists()).map(|name| options.open(name));
    let packs: Vec<File> = packs.collect::<Result<_, _>>().map_err(io)?;
    let packs: Vec<&File> = packs.iter().collect();
    let mut out = File::create(directory.join("layer.tar")).map_err(io)?;
    let mut tar = overseer.hand(base, &packs)?;
    while directory.join("deaf").exists() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let copier = std::thread::spawn(move || std::io::copy(&mut tar, &mut out));
    let mut served = None;
    let mut serve = |door| served = Some(serve(door, directory));
    let serve: Option<Serve<'_>> = match directory.join("door").exists() {
        true => Some(&mut serve),
        false => None,
    };
    let ended = overseer.listen(serve, observe);
    drop(served);
    if let Ok(copied) = copier.join() {
        copied.map_err(io)?;
    }
    ended
}

/// Answers every connection with what is in the file `door` of the directory.
fn serve(door: std::net::TcpListener, directory: &Path) -> std::thread::JoinHandle<()> {
    let answer = std::fs::read(directory.join("door")).unwrap_or_default();
    std::thread::spawn(move || {
        for stream in door.incoming().flatten() {
            let mut stream = stream;
            let _ = std::io::Write::write_all(&mut stream, &answer);
        }
    })
}
