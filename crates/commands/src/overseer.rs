//! The overseer as its parent sees it: a process that is started while the parent has the host's
//! rights, and that has commands run for it when it has given them up.
//!
//! The parent fetches, and whoever it speaks to may take it over. So what is to be run, and where,
//! is said before ([`Order`]); what comes of the network ([`Base`]) and the files of layers come
//! later, and are judged (`judge`).

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, PipeReader, PipeWriter, Read as _};
use std::net::TcpListener;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use sandbox::{Sandbox, SandboxError};
use serde::{Deserialize, Serialize};

use crate::order::{self, Base, Event, LINE_BYTES_MAX, Order};
use crate::{CommandEnd, CommandsError, Unable, handing};

/// How much of an overseer's complaints is kept.
const COMPLAINT_BYTES_MAX: u64 = 4 << 10;

/// Takes the commands' only way out of their network and serves it, until commands are over.
pub type Serve<'a> = &'a mut dyn FnMut(TcpListener);

/// What an overseer says, one to a line.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Told {
    Event(Event),
    /// The last word.
    Ended(Verdict),
}

/// How it went: what is left of a [`CommandsError`] on its way to another process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Verdict {
    Done,
    Failed { index: usize, end: CommandEnd },
    Refused { text: String },
    Broken { text: String },
    Io { action: String, cause: Cause },
    NoLimits { action: String, cause: Cause },
    NoProcess { action: String, cause: Cause },
}

/// What the system says: whose fault it is follows from its kind, a full disk's above all.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Cause {
    code: Option<i32>,
    text: String,
}

impl From<io::Error> for Cause {
    fn from(error: io::Error) -> Self {
        Self { code: error.raw_os_error(), text: error.to_string() }
    }
}

impl From<Cause> for io::Error {
    fn from(Cause { code, text }: Cause) -> Self {
        code.map_or_else(|| Self::other(text), Self::from_raw_os_error)
    }
}

impl Verdict {
    pub(crate) fn of(ended: Result<(), CommandsError>) -> Self {
        match ended {
            Ok(()) => Self::Done,
            Err(CommandsError::Failed { index, end, .. }) => Self::Failed { index, end },
            Err(CommandsError::Refused(text)) => Self::Refused { text },
            Err(CommandsError::Broken(text)) => Self::Broken { text },
            Err(CommandsError::Unable(Unable::NoLimits(error))) => {
                Self::NoLimits { action: error.action, cause: error.source.into() }
            }
            Err(CommandsError::Sandbox(error)) => {
                Self::NoProcess { action: error.action, cause: error.source.into() }
            }
            Err(CommandsError::Io { action, source }) => {
                Self::Io { action: action.into_owned(), cause: source.into() }
            }
            // Neither is found out by who runs commands.
            Err(error @ (CommandsError::Unable(_) | CommandsError::Denied { .. })) => {
                Self::Broken { text: error.to_string() }
            }
        }
    }
}

/// A process that runs the commands of one build for its parent. It ends with the thread that has
/// started it, and when this is dropped.
#[derive(Debug)]
pub struct Overseer {
    commands: Vec<String>,
    stdin: PipeWriter,
    stdout: PipeReader,
    stderr: PipeReader,
    files: OwnedFd,
    // Behind the pipes: where it is no child of this process any more they end it.
    _process: Sandbox,
}

impl Overseer {
    /// Starts it, with the rights that this process has now and its limits. It waits for
    /// [`Overseer::hand`].
    ///
    /// To be called before anything foreign is read, by a thread that lives as long as the commands
    /// may run: with it everything that was started ends.
    ///
    /// # Errors
    /// [`CommandsError`] when the process cannot be started.
    pub fn start(order: &Order) -> Result<Self, CommandsError> {
        let io = CommandsError::io;
        let (files, theirs) = handing::pair().map_err(io("make a pair of sockets"))?;
        let program = File::open("/proc/self/exe").map_err(io("open this program"))?;
        let arguments = [c"builderd", c"commands-process", c"overseer"];
        let (process, pipes) = Sandbox::spawn_beside(&program, &arguments, &[theirs.as_fd()])?;
        drop(theirs);
        order::send(&pipes.stdin, order).map_err(io("say which commands are to be run"))?;
        Ok(Self {
            commands: order.commands.clone(),
            stdin: pipes.stdin,
            stdout: pipes.stdout,
            stderr: pipes.stderr,
            files,
            _process: process,
        })
    }

    /// Has the commands run on the image whose layer packs are in `packs`, open to be read alone.
    /// Gives what they change, as the tar of one more layer: it is worth something only when
    /// [`Overseer::listen`] succeeds. To be called once.
    ///
    /// # Errors
    /// [`CommandsError`] when it was not taken.
    pub fn hand(&self, base: &Base, packs: &[&File]) -> Result<PipeReader, CommandsError> {
        let packs: Vec<BorrowedFd<'_>> = packs.iter().map(|pack| pack.as_fd()).collect();
        let layer = order::send(&self.stdin, base)
            .and_then(|()| handing::hand(&self.files, &packs))
            .and_then(|()| handing::take(&self.files, 1));
        match layer.map(|mut files| files.pop()) {
            Ok(Some(layer)) => Ok(layer.into()),
            // It has ended, and says why.
            Ok(None) | Err(_) => {
                let ended = self.listen(None, &mut |_| ()).err();
                Err(ended.unwrap_or_else(|| self.without_a_word()))
            }
        }
    }

    /// Listens until the commands have ended. Where the order has a door, the commands have one way
    /// out of their network, which `serve` is given; they find it in the variables by which programs
    /// look for a proxy.
    ///
    /// # Errors
    /// [`CommandsError`]; the first command that does not end well ends it.
    pub fn listen(
        &self,
        serve: Option<Serve<'_>>,
        observe: &mut dyn FnMut(Event),
    ) -> Result<(), CommandsError> {
        if let Some(serve) = serve {
            let action = "take the way out of the commands";
            let door = handing::take(&self.files, 1).map_err(CommandsError::io(action))?.pop();
            // Without one it is said why.
            door.into_iter().for_each(|door| serve(door.into()));
        }
        let mut lines = BufReader::new(&self.stdout);
        loop {
            let mut line = Vec::new();
            match (&mut lines).take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return Err(self.without_a_word()),
                Ok(_) => {}
            }
            match serde_json::from_slice(&line) {
                Ok(Told::Event(event)) => observe(event),
                Ok(Told::Ended(verdict)) => return self.ended(verdict),
                Err(error) => {
                    let text = format!("their overseer does not make sense: {error}");
                    return Err(CommandsError::Broken(text));
                }
            }
        }
    }

    fn ended(&self, verdict: Verdict) -> Result<(), CommandsError> {
        let error = |action, cause: Cause| SandboxError { action, source: cause.into() };
        Err(match verdict {
            Verdict::Done => return Ok(()),
            Verdict::Failed { index, end } => {
                let command = self.commands.get(index).cloned().unwrap_or_default();
                CommandsError::Failed { index, command, end }
            }
            Verdict::Refused { text } => CommandsError::Refused(text),
            Verdict::Broken { text } => CommandsError::Broken(text),
            Verdict::Io { action, cause } => {
                CommandsError::Io { action: action.into(), source: cause.into() }
            }
            Verdict::NoLimits { action, cause } => Unable::NoLimits(error(action, cause)).into(),
            Verdict::NoProcess { action, cause } => CommandsError::Sandbox(error(action, cause)),
        })
    }

    fn without_a_word(&self) -> CommandsError {
        let mut complaint = String::new();
        let _ = (&self.stderr).take(COMPLAINT_BYTES_MAX).read_to_string(&mut complaint);
        let complaint = complaint.trim();
        CommandsError::Broken(format!("their overseer ended without a result: {complaint}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_commands_ended_is_the_same_in_the_other_process() {
        let (stdout, stdin) = io::pipe().unwrap();
        let shell = File::open("/bin/sh").unwrap();
        let (process, pipes) = Sandbox::spawn_beside(&shell, &[c"sh", c"-c", c":"], &[]).unwrap();
        let overseer = Overseer {
            commands: vec!["true".into(), "false".into()],
            stdin,
            stdout,
            stderr: pipes.stderr,
            files: handing::pair().unwrap().0,
            _process: process,
        };
        let full = || io::Error::from_raw_os_error(28);
        let sandbox = || SandboxError { action: "fly".into(), source: full() };
        let failed = |end| CommandsError::Failed { index: 1, command: "false".into(), end };
        for error in [
            failed(CommandEnd::Exited(3)),
            failed(CommandEnd::Killed(9)),
            failed(CommandEnd::OutOfMemory),
            failed(CommandEnd::TimedOut),
            failed(CommandEnd::DiskFull),
            failed(CommandEnd::TooManyProcesses),
            CommandsError::Refused("a link".into()),
            CommandsError::Broken("the disk".into()),
            CommandsError::io("make the disk of the commands")(full()),
            CommandsError::io("read")(io::ErrorKind::UnexpectedEof.into()),
            CommandsError::Unable(Unable::NoLimits(sandbox())),
            CommandsError::Sandbox(sandbox()),
        ] {
            let before = (error.to_string(), kind(&error));
            let text = serde_json::to_string(&Told::Ended(Verdict::of(Err(error)))).unwrap();
            let Told::Ended(verdict) = serde_json::from_str(&text).unwrap() else {
                panic!("{text}");
            };
            let after = overseer.ended(verdict).unwrap_err();
            assert_eq!((after.to_string(), kind(&after)), before, "{text}");
        }
        overseer.ended(Verdict::of(Ok(()))).unwrap();
    }

    /// Which error it is, of what, and of which kind the system's word is that it began with.
    fn kind(error: &CommandsError) -> (String, Vec<String>, Option<io::ErrorKind>) {
        let name = format!("{error:?}").split([' ', '(']).next().unwrap().to_owned();
        let first: &dyn std::error::Error = error;
        let causes: Vec<_> = std::iter::successors(Some(first), |error| error.source()).collect();
        let said = causes.last().and_then(|last| last.downcast_ref::<io::Error>());
        // Of one without a number the words alone are left.
        let kind = said.filter(|said| said.raw_os_error().is_some()).map(io::Error::kind);
        (name, causes.iter().map(ToString::to_string).collect(), kind)
    }
}
