//! Going to the background: the same program again, in a session of its own, until it is ready.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail};

use crate::{
    instance::{self, Part},
    paths::Paths,
};

/// Starts this program again without `--detach` and returns when it has said that it is ready.
///
/// # Errors
/// When it ends before that; the message has the end of its log.
pub(crate) fn detach(paths: &Paths) -> anyhow::Result<()> {
    let log = &paths.log_file;
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder).with_context(|| format!("folder {}", folder.display()))?;
    }
    let file = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("log {}", log.display()))?;
    let mut command = Command::new("/proc/self/exe");
    command
        .args(std::env::args_os().skip(1).filter(|argument| argument != "--detach"))
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    // SAFETY: setsid is async-signal-safe and touches nothing of this process's memory.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(std::io::Error::from));
    }
    let mut child = command.spawn().context("start in the background")?;
    wait_ready(paths, &mut child)?;
    println!(
        "keelson runs in the background as process {}; its log is {}",
        child.id(),
        log.display()
    );
    Ok(())
}

fn wait_ready(paths: &Paths, child: &mut Child) -> anyhow::Result<()> {
    let pid = i32::try_from(child.id()).context("process id")?;
    loop {
        if let Some(status) = child.try_wait().context("wait for the background process")? {
            let log = fs::read_to_string(&paths.log_file).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let end = lines[lines.len().saturating_sub(10)..].join("\n");
            bail!(
                "the background process ended: {status}; the end of {}:\n{end}",
                paths.log_file.display()
            );
        }
        if instance::read(paths, Part::ControlPlane)
            .is_ok_and(|r| r.is_some_and(|r| r.pid == pid && r.ready))
        {
            return Ok(());
        }
        // The step between two looks.
        std::thread::sleep(Duration::from_millis(50));
    }
}
