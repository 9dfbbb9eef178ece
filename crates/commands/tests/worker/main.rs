//! The program that the tests start again as keeper, unpacker and reader; started by a test it
//! takes an order on its standard input and writes the layer and what happened to files.

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let word = |at: usize| arguments.get(at).map(String::as_str);
    match (word(1), word(2)) {
        (Some(commands::ARGUMENT), Some(role)) => commands::main(role),
        (Some("run"), Some(directory)) => run(directory.as_ref()),
        _ => Err(std::io::Error::other("say what to do")),
    }
}

/// `order.json` and the pack `0`, `1`, … of a directory → `layer.tar`, `events.json` and, when it
/// fails, `error`.
fn run(directory: &std::path::Path) -> std::io::Result<()> {
    let order: commands::Order =
        serde_json::from_slice(&std::fs::read(directory.join("order.json"))?)?;
    let count = order.packs.iter().map(|pack| pack.file + 1).max().unwrap_or(0);
    let packs = (0..count).map(|at| std::fs::File::open(directory.join(at.to_string())));
    let packs: Vec<std::fs::File> = packs.collect::<Result<_, _>>()?;
    let packs: Vec<&std::fs::File> = packs.iter().collect();
    let (mut tar, layer) = std::io::pipe()?;
    let mut out = std::fs::File::create(directory.join("layer.tar"))?;
    let copier = std::thread::spawn(move || std::io::copy(&mut tar, &mut out));
    let mut events = Vec::new();
    let mut served = None;
    let mut serve = |door| served = Some(serve(door, directory));
    let serve: Option<commands::Serve<'_>> = match directory.join("door").exists() {
        true => Some(&mut serve),
        false => None,
    };
    let ended = commands::run(order, &packs, layer, serve, &mut |event| {
        println!("{event:?}");
        events.push(event);
    });
    drop(served);
    if let Ok(copied) = copier.join() {
        copied?;
    }
    std::fs::write(directory.join("events.json"), serde_json::to_vec(&events)?)?;
    match ended {
        Ok(()) => Ok(()),
        Err(error) => {
            let theirs = if error.is_theirs() { "theirs" } else { "ours" };
            std::fs::write(directory.join("error"), format!("{theirs}: {error}"))
        }
    }
}

/// Answers every connection with what is in the file `door` of the directory.
fn serve(door: std::net::TcpListener, directory: &std::path::Path) -> std::thread::JoinHandle<()> {
    let answer = std::fs::read(directory.join("door")).unwrap_or_default();
    std::thread::spawn(move || {
        for stream in door.incoming().flatten() {
            let mut stream = stream;
            let _ = std::io::Write::write_all(&mut stream, &answer);
        }
    })
}
