//! What the process says that fetches is judged before anything is done for it: a registry may
//! have taken it over. It can order no path and no right of the host, only files that it has open.

use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{FileType, OFlags};
use rustix::process::Resource;

use crate::order::{Base, Order, PackPart};
use crate::{CommandsError, bundle};

/// The longest that the environment of an image and its list of layers can be: as JSON, twice a
/// config of the largest size.
pub(crate) const BASE_BYTES_MAX: u32 = 16 << 20;

/// How many files are needed for the layers of an image.
///
/// # Errors
/// When it has more layers than an image may, or names files that they would not need.
pub(crate) fn files(order: &Order, base: &Base) -> Result<usize, CommandsError> {
    let most = usize::try_from(order.tree_limits.layers_max).unwrap_or(usize::MAX);
    let files =
        base.packs.iter().map(|pack| pack.file).max().map_or(0, |last| last.saturating_add(1));
    match base.packs.len() <= most && files <= base.packs.len() {
        true => Ok(files),
        false => Err(refused("more layers than an image may have")),
    }
}

/// Whether what was handed over can hold the layers.
///
/// # Errors
/// When one is no file that is there to be read, or ends before its layer does.
pub(crate) fn packs(base: &Base, files: &[OwnedFd]) -> Result<(), CommandsError> {
    let sizes = files.iter().map(size).collect::<Result<Vec<u64>, _>>()?;
    match lie_within(base, &sizes) {
        true => Ok(()),
        false => Err(refused("a layer that is not in its file")),
    }
}

/// Whether each layer lies in one of the files of these sizes.
pub(crate) fn lie_within(base: &Base, sizes: &[u64]) -> bool {
    let lies_in = |part: &PackPart| {
        let end = part.base.checked_add(part.length);
        sizes.get(part.file).is_some_and(|size| end.is_some_and(|end| end <= *size))
    };
    base.packs.iter().all(lies_in)
}

/// Whether a program can be started in the directory and with the environment that the image's config
/// names, by what the kernel takes: path_resolution(7), execve(2).
///
/// # Errors
/// [`CommandsError::Refused`], with the field and what to do about it.
pub(crate) fn image(order: &Order, base: &Base) -> Result<(), CommandsError> {
    let stack = rustix::process::getrlimit(Resource::Stack).current;
    let most = Most { word: rustix::param::page_size() * PAGES_OF_A_WORD, all: all_words(stack) };
    let problem = directory_problem(&base.working_directory)
        .or_else(|| environment_problem(order, base, most));
    problem.map_or(Ok(()), |problem| Err(CommandsError::Refused(problem)))
}

/// `MAX_ARG_STRLEN`, linux/binfmts.h.
const PAGES_OF_A_WORD: usize = 32;
/// Room for what is added to an image's environment, and for the shell's own words.
const ROOM: usize = 8 << 10;

/// Bytes of a program's words, the zero at their end included.
#[derive(Clone, Copy)]
struct Most {
    word: usize,
    all: usize,
}

/// Of all arguments and variables of a program together: execve(2), "Limits on size of arguments and
/// environment".
fn all_words(stack: Option<u64>) -> usize {
    const LEAST: u64 = 128 << 10;
    const MOST: u64 = 6 << 20;
    let all = stack.map_or(MOST, |stack| (stack / 4).min(MOST)).max(LEAST);
    usize::try_from(all).unwrap_or(usize::MAX)
}

fn directory_problem(path: &str) -> Option<String> {
    /// `PATH_MAX` and `NAME_MAX`, linux/limits.h: the first with the zero at the end.
    const PATH_BYTES: usize = 4096;
    const NAME_BYTES: usize = 255;
    let problem = if path.contains('\0') {
        "has a NUL character, which no path can have".to_owned()
    } else if path.len() + 1 >= PATH_BYTES {
        format!("has {} bytes, and a path can have {}", path.len(), PATH_BYTES - 2)
    } else {
        let long = path.split('/').map(str::len).find(|length| *length > NAME_BYTES)?;
        format!("has a name of {long} bytes in it, and a name can have {NAME_BYTES}")
    };
    let shown = shown(path);
    Some(format!(
        "the working directory of the image (WorkingDir of its config, {shown}) {problem}: no command \
         can be run there; build the image with another one"
    ))
}

fn environment_problem(order: &Order, base: &Base, most: Most) -> Option<String> {
    let variables = bundle::environment(base, None);
    let too_long = variables.iter().find(|variable| variable.len() >= most.word);
    if let Some(variable) = too_long {
        let name = shown(variable.split('=').next().unwrap_or_default());
        return Some(format!(
            "the variable {name} of the image's environment (Env of its config) has {} bytes, and no \
             program can be started with one of more than {}: build the image with a shorter one",
            variable.len(),
            most.word - 1
        ));
    }
    // Each has a zero at its end, and a pointer that leads to it.
    let room = |length: usize| length + 1 + size_of::<usize>();
    let command = order.commands.iter().map(String::len).max().unwrap_or(0);
    let all = variables.iter().map(|variable| room(variable.len())).sum::<usize>();
    let left = most.all.saturating_sub(room(command) + ROOM);
    (all > left).then(|| {
        format!(
            "the image's environment (Env of its config) takes {all} bytes, and no program can be \
             started with more than {left}: build the image with less of it"
        )
    })
}

/// The beginning of a text of an image, for an error.
fn shown(text: &str) -> String {
    const CHARS_MAX: usize = 64;
    let cut = text.chars().nth(CHARS_MAX).map_or("", |_| "…");
    format!("{:?}{cut}", text.chars().take(CHARS_MAX).collect::<String>())
}

/// How large a file is that is one, and open to be read alone.
fn size(file: &OwnedFd) -> Result<u64, CommandsError> {
    let failed = |_| refused("what cannot be looked at");
    let flags = rustix::fs::fcntl_getfl(file.as_fd()).map_err(failed)?;
    let stat = rustix::fs::fstat(file).map_err(failed)?;
    let is_read = flags & OFlags::RWMODE == OFlags::RDONLY && !flags.contains(OFlags::PATH);
    match is_read && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
        true => Ok(u64::try_from(stat.st_size).unwrap_or(0)),
        false => Err(refused("what is no file that is open to be read alone")),
    }
}

/// No image and no tenant brings this about.
fn refused(what: &str) -> CommandsError {
    CommandsError::Broken(format!("the process that fetches handed over {what}"))
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};

    use super::*;

    fn base(parts: &[(usize, u64, u64)]) -> Base {
        let part = |&(file, base, length): &(usize, u64, u64)| PackPart { file, base, length };
        Base { packs: parts.iter().map(part).collect(), ..Base::default() }
    }

    fn order() -> Order {
        let text = r#"{"scratch_directory":"/nowhere","disk_bytes":0,"runtime":"/nowhere",
            "commands":[],"limits":{"memory_bytes":0,"pids_max":0,"secs_max":null},
            "layer_bytes_max":0,"has_door":false,"tree_limits":null}"#;
        let mut value: serde_json::Value = serde_json::from_str(text).unwrap();
        value["tree_limits"] = serde_json::to_value(rootfs::TreeLimits::default()).unwrap();
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn files_are_those_of_layers_and_no_more_than_an_image_has() {
        let files = |parts: &[_]| files(&order(), &base(parts)).ok();
        assert_eq!(files(&[]), Some(0));
        assert_eq!(files(&[(0, 0, 1), (1, 0, 1), (0, 1, 1)]), Some(2));
        assert_eq!(files(&[(1, 0, 1)]), None);
        assert_eq!(files(&[(usize::MAX, 0, 1)]), None);
        assert_eq!(files(&vec![(0, 0, 1); 1024]), Some(1));
        assert_eq!(files(&vec![(0, 0, 1); 1025]), None);
    }

    /// What is said of an image with this directory and these variables.
    fn said(working_directory: &str, environment: &[&str]) -> Option<String> {
        let environment = environment.iter().map(|&variable| variable.to_owned()).collect();
        let working_directory = working_directory.to_owned();
        let base = Base { working_directory, environment, ..Base::default() };
        image(&order(), &base).err().map(|error| {
            assert!(error.is_theirs(), "{error}");
            error.to_string()
        })
    }

    #[test]
    fn a_directory_that_no_path_can_name_is_refused_and_what_to_do_is_said() {
        let name = "n".repeat(255);
        let deep = |count: usize| "/d".repeat(count);
        for good in ["", "/", "srv", "/a b/\u{e9}", &name, &deep(2047)] {
            assert_eq!(said(good, &[]), None, "{good}");
        }
        for (bad, words) in [
            ("/srv\0x", "has a NUL character"),
            ("\0", "has a NUL character"),
            (&*deep(2048), "has 4096 bytes, and a path can have 4094"),
            (&*format!("/srv/{name}n"), "has a name of 256 bytes in it"),
            (&*"x".repeat(1 << 20), "has 1048576 bytes"),
        ] {
            let said = said(bad, &[]).unwrap();
            assert!(said.contains(words) && said.contains("WorkingDir"), "{said}");
            assert!(said.contains("build the image with another one"), "{said}");
            assert!(said.len() < 512 && !said.contains('\0'), "{said}");
        }
    }

    #[test]
    fn an_environment_that_no_program_can_have_is_refused_and_what_to_do_is_said() {
        let word = rustix::param::page_size() * PAGES_OF_A_WORD;
        let of = |bytes: usize| format!("LONG={}", "x".repeat(bytes - "LONG=".len()));
        let (longest, too_long) = (of(word - 1), of(word));
        assert_eq!(said("", &[&longest]), None);
        let refused = said("", &["A=b", &too_long]).unwrap();
        assert!(refused.contains("\"LONG\"") && refused.contains("Env"), "{refused}");
        assert!(refused.contains("has 131072 bytes") || word != 131_072, "{refused}");
        // As many as need more than the kernel takes of any program.
        let many = vec![longest.as_str(); (6 << 20) / word + 1];
        let refused = said("", &many).unwrap();
        assert!(refused.contains("Env of its config") && refused.contains("takes"), "{refused}");
        assert!(refused.len() < 512, "{refused}");
        let short = vec!["A=b"; (6 << 20) / 10];
        assert!(said("", &short).is_some(), "pointers count as well");
        // What is no variable is left out, and harms nobody.
        assert_eq!(said("", &["A=\0", "\0", "=", "ALONE", &"x".repeat(2 * word)]), None);
    }

    #[test]
    fn what_the_kernel_takes_depends_on_the_stack_as_it_says() {
        assert_eq!(all_words(Some(8 << 20)), 2 << 20);
        assert_eq!(all_words(None), 6 << 20);
        assert_eq!(all_words(Some(u64::MAX)), 6 << 20);
        assert_eq!(all_words(Some(0)), 128 << 10);
    }

    #[test]
    fn a_layer_lies_in_a_file_that_is_open_to_be_read_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(100).unwrap();
        let open = |options: &mut OpenOptions| OwnedFd::from(options.open(file.path()).unwrap());
        let good = || open(OpenOptions::new().read(true));
        let is_good = |file: OwnedFd, base_bytes, length| {
            packs(&base(&[(0, base_bytes, length)]), &[file]).is_ok()
        };
        assert!(is_good(good(), 0, 100) && is_good(good(), 40, 60));
        assert!(!is_good(good(), 41, 60) && !is_good(good(), u64::MAX, 2));
        assert!(packs(&base(&[(1, 0, 0)]), &[good()]).is_err(), "one that is not there");
        assert!(!is_good(open(OpenOptions::new().read(true).write(true)), 0, 1));
        assert!(!is_good(open(OpenOptions::new().write(true)), 0, 1));
        for path in ["/", "/dev/zero"] {
            assert!(!is_good(File::open(path).unwrap().into(), 0, 0), "{path}");
        }
        let name = rustix::fs::open(file.path(), OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
        assert!(!is_good(name, 0, 0), "a place alone");
        assert!(!is_good(std::io::pipe().unwrap().0.into(), 0, 0));
    }
}
