//! `subPath`: a part of a volume, which a container must not be able to turn into something else.
//!
//! A container may write to the volume and plant a link there, also while another container's
//! `subPath` is being resolved. So the part is opened by the kernel with the volume as its bound,
//! and what was opened is what is mounted: by its descriptor, not by its name.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::{Mode, fchmod, mkdirat},
};

use super::mounts;

/// Opens a part of a volume; makes the folders that are missing, with the volume's own mode.
fn open_part(volume: &Path, part: &Path) -> io::Result<OwnedFd> {
    let names: Option<Vec<OsString>> = part
        .components()
        .map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            _ => None,
        })
        .collect();
    let Some(names) = names.filter(|names| !names.is_empty()) else {
        let reason = format!("subPath {part:?} must be relative and must not contain '..'");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = match open(volume, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())? {
        root if File::from(root.try_clone()?).metadata()?.is_dir() => root,
        _ => return Err(io::Error::new(io::ErrorKind::NotADirectory, "the volume is a file")),
    };
    let mode = fs::metadata(volume)?.permissions().mode() & 0o7777;
    let how = |flags: OFlag| {
        OpenHow::new()
            .flags(flags)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS)
    };
    let mut parent = root.try_clone()?;
    for at in 1..=names.len() {
        let path: PathBuf = names[..at].iter().collect();
        let last = at == names.len();
        let flags = if last { OFlag::O_PATH | OFlag::O_CLOEXEC } else { flags };
        parent = match openat2(&root, &path, how(flags)) {
            Err(Errno::ENOENT) => {
                let name = names[at - 1].as_os_str();
                match mkdirat(&parent, name, Mode::S_IRWXU) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(errno) => return Err(errno.into()),
                }
                let made = openat2(&root, &path, how(OFlag::O_DIRECTORY | OFlag::O_CLOEXEC))?;
                // Whatever the umask.
                fchmod(&made, Mode::from_bits_truncate(mode))?;
                openat2(&root, &path, how(flags))?
            }
            Err(Errno::EXDEV) => {
                let reason = format!("subPath {part:?} leaves the volume through a link");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
            }
            opened => opened?,
        };
    }
    Ok(parent)
}

/// Mounts a part of a volume at `target`, which is made. What is mounted there already stays if it
/// is the same, and is replaced otherwise.
pub(crate) fn mount_part(volume: &Path, part: &Path, target: &Path) -> io::Result<()> {
    let opened = open_part(volume, part)?;
    let found = File::from(opened.try_clone()?).metadata()?;
    if mounts::is_mount_point(target)? {
        let mounted = fs::metadata(target)?;
        if (mounted.dev(), mounted.ino()) == (found.dev(), found.ino()) {
            return Ok(());
        }
        mounts::unmount(target)?;
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    // What is bound must be of the kind of what it is bound to.
    match fs::symlink_metadata(target) {
        Ok(old) if old.is_dir() != found.is_dir() => {
            if old.is_dir() { fs::remove_dir(target) } else { fs::remove_file(target) }?;
            make(target, found.is_dir())?;
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(target, found.is_dir())?,
        Err(error) => return Err(error),
    }
    mounts::bind(opened.as_fd(), target)
}

fn make(target: &Path, folder: bool) -> io::Result<()> {
    if folder { fs::create_dir(target) } else { File::create_new(target).map(drop) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn no_link_leads_out_of_the_volume() {
        let all = tempfile::tempdir().unwrap();
        let (volume, outside) = (all.path().join("volume"), all.path().join("outside"));
        fs::create_dir_all(volume.join("inside")).unwrap();
        fs::set_permissions(&volume, fs::Permissions::from_mode(0o770)).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(volume.join("inside/file"), "x").unwrap();
        symlink("inside", volume.join("fine")).unwrap();
        symlink("../outside", volume.join("up")).unwrap();
        symlink(&outside, volume.join("away")).unwrap();
        symlink("/proc/self/root", volume.join("magic")).unwrap();
        for (part, right) in [
            ("inside", true),
            ("inside/file", true),
            ("fine/file", true),
            ("new/deep", true),
            ("fine/made", true),
            ("up", false),
            ("up/new", false),
            ("away", false),
            ("away/new", false),
            ("magic/etc", false),
            ("inside/file/x", false),
            ("..", false),
            ("inside/../..", false),
            ("/etc", false),
            ("", false),
        ] {
            assert_eq!(open_part(&volume, Path::new(part)).is_ok(), right, "{part}");
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        assert_eq!(fs::metadata(volume.join("new/deep")).unwrap().mode() & 0o7777, 0o770);
    }
}
