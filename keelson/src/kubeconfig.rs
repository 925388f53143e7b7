//! `keelson kubeconfig`: what kubectl needs.

use std::{fs, io::Write, os::unix::fs::OpenOptionsExt, path::Path};

use anyhow::{Context, bail};

use crate::{cli::KubeconfigArgs, paths::Paths};

/// Prints the administrator's kubeconfig, or writes it where it is asked for.
///
/// # Errors
/// When there is none yet, or the file can't be written.
pub(crate) fn run(args: &KubeconfigArgs) -> anyhow::Result<()> {
    let paths = Paths::new(args.data.data_dir.as_deref()).context("data folder")?;
    let path = &paths.admin_kubeconfig;
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("{} is not there yet: `keelson up{}` makes it", path.display(), paths.flag())
        }
        Err(error) => return Err(error).with_context(|| format!("kubeconfig {}", path.display())),
    };
    match &args.output {
        Some(output) => write_private(output, &text),
        None => {
            print!("{text}");
            Ok(())
        }
    }
}

/// Writes a file that only its owner may read, in one step.
///
/// # Errors
/// When the folder or the file can't be written.
pub(crate) fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    let context = || format!("write {}", path.display());
    if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
        fs::create_dir_all(folder).with_context(context)?;
    }
    let mut name = path.file_name().with_context(context)?.to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let mut file = fs::OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .with_context(context)?;
    file.write_all(text.as_bytes()).with_context(context)?;
    fs::rename(&temporary, path).with_context(context)
}
