//! Running iptables' programs.
//!
//! They act on the network namespace of the thread that starts them, so one thread starts them all:
//! it is in the namespace of whoever opened the backend.

use std::{
    collections::VecDeque,
    ffi::OsStr,
    fs, io,
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::JoinHandle,
};

use nix::sys::{prctl::set_pdeathsig, signal::Signal};

use super::{Variant, chain::Table};
use crate::{backend::BackendError, model::Family};

/// Since this release `iptables-restore` waits for others who write, and masquerading picks ports
/// at random.
const VERSION_MIN: (u32, u32, u32) = (1, 6, 2);
/// For how many seconds others who write are waited for.
const WAIT: &str = "5";
/// The status with which iptables ends where a chain isn't there.
const NO_SUCH_CHAIN: i32 = 1;
/// The status with which iptables ends where others hold its lock, or the kernel has no room.
const RESOURCE_PROBLEM: i32 = 4;
/// What it says where the process may not do that.
const NO_RIGHT: &str = "Permission denied";
/// Where programs are that a service's search path may lack.
const SYSTEM_PATH: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// So many of the programs that were run last are known by their number.
const OWN: usize = 32;

/// The numbers of the programs that were run, by which the kernel names them to those who listen.
#[derive(Clone, Debug, Default)]
pub(crate) struct OwnPrograms(Arc<Mutex<VecDeque<u32>>>);

impl OwnPrograms {
    fn started(&self, pid: u32) {
        let mut own = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        own.push_front(pid);
        own.truncate(OWN);
    }

    /// Whether a program is one of these.
    pub(crate) fn include(&self, pid: u32) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&pid)
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// The programs of one family and variant.
#[derive(Debug)]
pub(crate) struct Programs {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    pub(super) family: Family,
    pub(super) own: OwnPrograms,
    /// `iptables`, `ip6tables-legacy`, …
    name: String,
    save: PathBuf,
    /// Which one writes; another one stands for what may go wrong, in tests.
    pub(super) restore: PathBuf,
    /// What the program calls itself.
    pub(crate) version: String,
    /// Whether it writes the kernel's old tables.
    pub(crate) legacy: bool,
}

impl Drop for Programs {
    /// A program that runs is waited for.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A job's panic was its caller's.
            let _ = thread.join();
        }
    }
}

impl Programs {
    /// Finds the programs and starts their thread.
    ///
    /// # Errors
    /// When one is missing or too old.
    pub(crate) fn find(family: Family, variant: Variant) -> Result<Self, BackendError> {
        let name = program_name(family, variant);
        let main = find(&name)?;
        let (jobs, queue) = mpsc::channel::<Job>();
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || queue.into_iter().for_each(|job| job()))
            .map_err(|source| BackendError::Io {
                doing: format!("start {name}'s thread"),
                source,
            })?;
        let mut programs = Self {
            jobs: Some(jobs),
            thread: Some(thread),
            family,
            own: OwnPrograms::default(),
            save: find(&format!("{name}-save"))?,
            restore: find(&format!("{name}-restore"))?,
            name,
            version: String::new(),
            legacy: false,
        };
        programs.version = programs.run(&main, &["--version"], None)?.trim().to_owned();
        programs.legacy = !programs.version.contains("nf_tables");
        if version(&programs.version).is_some_and(|found| found < VERSION_MIN) {
            let (major, minor, patch) = VERSION_MIN;
            let message = format!(
                "{:?} is too old: {major}.{minor}.{patch} or newer is needed",
                programs.version
            );
            return Err(programs.error(message));
        }
        Ok(programs)
    }

    /// What a table has.
    ///
    /// # Errors
    /// When it can't be read.
    pub(crate) fn save(&self, table: Table) -> Result<String, BackendError> {
        if self.legacy && !self.has_legacy_table(table)? {
            // Asking for it would make it.
            return Ok(String::new());
        }
        self.run(&self.save, &["-t", table.as_str()], None)
    }

    /// Writes changes; each table's are written as a whole or not at all.
    ///
    /// # Errors
    /// When the program or the kernel refuses, with the line that it refuses.
    pub(crate) fn restore(&self, input: String) -> Result<(), BackendError> {
        let arguments = ["-w", WAIT, "--noflush", "--counters"];
        self.run(&self.restore, &arguments, Some(input)).map(drop)
    }

    /// Whether a table has this chain. Other chains are not looked at.
    ///
    /// # Errors
    /// When the program can't be run.
    pub(crate) fn has_chain(&self, table: Table, chain: &str) -> Result<bool, BackendError> {
        let main = find(&self.name)?;
        let arguments = ["-w", WAIT, "-t", table.as_str(), "-S", chain, "1"];
        let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
        let output = self.output(&main, arguments, None)?;
        match output.status.code() {
            Some(0) => Ok(true),
            Some(NO_SUCH_CHAIN) => Ok(false),
            // Somebody else writes for too long, or there is no memory.
            _ => {
                let message = String::from_utf8_lossy(&output.stderr);
                Err(self.error(explain(&message, None, &output.status.to_string())))
            }
        }
    }

    /// The rules of a chain with how many packets each has met; none if there is no such chain.
    ///
    /// # Errors
    /// When the program can't be run.
    pub(crate) fn counted(&self, table: Table, chain: &str) -> Result<String, BackendError> {
        let main = find(&self.name)?;
        let arguments = ["-w", WAIT, "-t", table.as_str(), "-v", "-S", chain];
        let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
        let output = self.output(&main, arguments, None)?;
        match output.status.code() {
            Some(0) => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            Some(NO_SUCH_CHAIN) => Ok(String::new()),
            _ => {
                let message = String::from_utf8_lossy(&output.stderr);
                Err(self.error(explain(&message, None, &output.status.to_string())))
            }
        }
    }

    /// Writes one of the kernel's settings, in the namespace of the rules.
    ///
    /// # Errors
    /// When it can't be written.
    pub(crate) fn set(&self, setting: &'static str, value: &'static str) -> io::Result<()> {
        self.there(move || {
            let path = Path::new("/proc/sys").join(setting);
            if fs::read_to_string(&path).is_ok_and(|present| present.trim() == value) {
                return Ok(());
            }
            fs::write(path, value)
        })?
    }

    /// Reads one of the kernel's settings.
    ///
    /// # Errors
    /// When it can't be read.
    pub(crate) fn setting(&self, setting: &'static str) -> io::Result<String> {
        self.there(move || fs::read_to_string(Path::new("/proc/sys").join(setting)))?
            .map(|value| value.trim().to_owned())
    }

    fn has_legacy_table(&self, table: Table) -> Result<bool, BackendError> {
        let family = self.family;
        let names = self.there(move || legacy_tables(family)).and_then(|names| names);
        match names {
            Ok(names) => Ok(names.lines().any(|name| name == table.as_str())),
            Err(source) => {
                let doing = format!("read {}", legacy_names(self.family));
                Err(BackendError::Io { doing, source })
            }
        }
    }

    fn run(
        &self,
        program: &Path,
        arguments: &[&str],
        input: Option<String>,
    ) -> Result<String, BackendError> {
        let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
        let refused = input.clone();
        let output = self.output(program, arguments, input)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let message = String::from_utf8_lossy(&output.stderr);
        let message = explain(&message, refused.as_deref(), &output.status.to_string());
        let program = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Err(match output.status.code() {
            // To wait would bring no right.
            Some(RESOURCE_PROBLEM) if message.contains(NO_RIGHT) => {
                BackendError::Program { program, message }
            }
            // Without a status it was ended by a signal.
            Some(RESOURCE_PROBLEM) | None => BackendError::Busy { program, message },
            Some(_) => BackendError::Program { program, message },
        })
    }

    fn output(
        &self,
        program: &Path,
        arguments: Vec<String>,
        input: Option<String>,
    ) -> Result<Output, BackendError> {
        let path = program.to_owned();
        let own = self.own.clone();
        self.there(move || run(&path, &arguments, input.as_deref(), &own))
            .and_then(|output| output)
            .map_err(|source| BackendError::Io {
                doing: format!("run {}", program.display()),
                source,
            })
    }

    /// Does something on the thread in the rules' namespace.
    fn there<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let (done, result) = mpsc::sync_channel(1);
        let job = Box::new(move || {
            let _ = done.send(job());
        });
        let ended = || io::Error::other("the thread that runs iptables is gone");
        let jobs = self.jobs.as_ref().ok_or_else(ended)?;
        jobs.send(job).map_err(|_| ended())?;
        result.recv().map_err(|_| ended())
    }

    fn error(&self, message: String) -> BackendError {
        BackendError::Program { program: self.name.clone(), message }
    }
}

fn run(
    program: &Path,
    arguments: &[String],
    input: Option<&str>,
    own: &OwnPrograms,
) -> io::Result<Output> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // What a killed proxy has begun must not be written when the next one has already looked. The
    // kernel takes a table's changes as a whole or not at all.
    // SAFETY: prctl is a plain system call, allowed between fork and exec.
    unsafe { command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
    let mut child = command.spawn()?;
    own.started(child.id());
    let stdin = child.stdin.take();
    std::thread::scope(|scope| {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            // A program that ends early tells why in its output.
            scope.spawn(move || stdin.write_all(input.as_bytes()));
        }
        child.wait_with_output()
    })
}

/// Whether this thread's network namespace has any of the kernel's old tables, or may have.
pub(super) fn has_legacy_tables(family: Family) -> bool {
    legacy_tables(family).map_or(true, |names| !names.is_empty())
}

fn legacy_names(family: Family) -> &'static str {
    match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    }
}

/// The names of the kernel's old tables that are there, each on a line.
fn legacy_tables(family: Family) -> io::Result<String> {
    match fs::read_to_string(legacy_names(family)) {
        // The module that makes the file isn't loaded.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        names => names,
    }
}

fn program_name(family: Family, variant: Variant) -> String {
    let family = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    match variant {
        Variant::Host => family.to_owned(),
        Variant::Nft => format!("{family}-nft"),
        Variant::Legacy => format!("{family}-legacy"),
    }
}

fn find(name: &str) -> Result<PathBuf, BackendError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SYSTEM_PATH.iter().map(PathBuf::from))
        .map(|folder| folder.join(OsStr::new(name)))
        .find(|file| file.is_file())
        .ok_or_else(|| BackendError::Program {
            program: name.to_owned(),
            message: "is not installed; the iptables mode needs it (package iptables)".to_owned(),
        })
}

/// The numbers in `iptables v1.8.9 (nf_tables)`.
fn version(text: &str) -> Option<(u32, u32, u32)> {
    let numbers = text.split_once(" v")?.1;
    let mut numbers = numbers.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let mut next = || numbers.next().and_then(Result::ok);
    Some((next()?, next()?, next().unwrap_or(0)))
}

/// What a program said, on one line, with the line of its input that it names.
fn explain(message: &str, input: Option<&str>, status: &str) -> String {
    let mut lines = message.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    let mut text = lines.by_ref().take(6).collect::<Vec<_>>().join("; ");
    if text.is_empty() {
        status.clone_into(&mut text);
    }
    let number = text.match_indices("line").find_map(|(at, _)| {
        let digits = text[at + 4..].trim_start_matches([' ', ':']);
        let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
        digits[..end].parse::<usize>().ok().filter(|number| *number > 0)
    });
    if let (Some(number), Some(input)) = (number, input)
        && let Some(line) = input.lines().nth(number - 1)
    {
        text.push_str(&format!(": {line}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_others_hold_is_told_from_a_refusal() {
        let programs = Programs::find(Family::V4, Variant::Host).unwrap();
        let ends = |how: &str| {
            let shell = Path::new("/bin/sh");
            programs.run(shell, &["-c", how], None).unwrap_err()
        };
        assert!(ends("exit 4").is_busy() && ends("kill -9 $$").is_busy());
        assert!(!ends("exit 1").is_busy() && !ends("exit 2").is_busy());
        assert!(!ends("echo 'Permission denied (you must be root)' >&2; exit 4").is_busy());
    }

    #[test]
    fn versions_are_read() {
        for (text, expected) in [
            ("iptables v1.8.9 (nf_tables)", Some((1, 8, 9))),
            ("ip6tables v1.6.2", Some((1, 6, 2))),
            ("iptables v1.8 (legacy)", Some((1, 8, 0))),
            ("iptables", None),
        ] {
            assert_eq!(version(text), expected, "{text}");
        }
    }

    #[test]
    fn the_refused_line_is_named() {
        let input = "*nat\n:KUBE-X - [0:0]\n-A KUBE-X -j KUBE-Y\nCOMMIT\n";
        for (message, expected) in [
            (
                "iptables-restore: line 3 failed\n",
                "iptables-restore: line 3 failed: -A KUBE-X -j KUBE-Y",
            ),
            (
                "iptables-restore v1.8.9 (nf_tables): \nline 3: RULE_APPEND failed\n",
                "iptables-restore v1.8.9 (nf_tables):; line 3: RULE_APPEND failed: -A KUBE-X -j KUBE-Y",
            ),
            ("# Warning: legacy\nno\n", "no"),
            ("", "exit status: 1"),
            ("line 99 failed", "line 99 failed"),
        ] {
            assert_eq!(explain(message, Some(input), "exit status: 1"), expected);
        }
    }
}
