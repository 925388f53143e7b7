//! Parts of volumes (`subPath`), mounted so that a container can't use a symbolic link to get out.
//!
//! The part is opened beneath the volume's folder with `openat2`, which refuses every way out, and
//! what was opened is bound to a folder of the agent. That folder is what the container gets.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{Mode, mkdirat},
};

use crate::container_config::mounts::SubPath;

/// Where a pod's bound sub-paths are.
pub(crate) fn folder(root_dir: &Path, pod_uid: &str) -> PathBuf {
    root_dir.join("pods").join(pod_uid).join("volume-subpaths")
}

/// Binds `sub_path` to `target` and makes it as a folder if it is not there. Idempotent. Blocks on
/// the file system.
pub(crate) fn bind(sub_path: &SubPath, target: &Path) -> io::Result<()> {
    let opened = open_beneath(sub_path)?;
    let is_dir = File::from(opened.try_clone()?).metadata()?.is_dir();
    // what an earlier attempt of the container left
    let _ = umount2(target, MntFlags::MNT_DETACH);
    if is_dir {
        fs::create_dir_all(target)?;
    } else {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        File::create(target)?;
    }
    let source = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
    mount(Some(&source), target, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
    Ok(())
}

fn how() -> OpenHow {
    OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS)
}

fn open_beneath(sub_path: &SubPath) -> io::Result<OwnedFd> {
    let mut current: OwnedFd = File::open(&sub_path.volume)?.into();
    let root = current.try_clone()?;
    if let Ok(opened) = openat2(root.as_fd(), &sub_path.relative, how()) {
        return Ok(opened);
    }
    for part in sub_path.relative.components() {
        let part: &Path = part.as_ref();
        current = match openat2(current.as_fd(), part, how()) {
            Ok(next) => next,
            Err(nix::errno::Errno::ENOENT) => {
                mkdirat(current.as_fd(), part, Mode::from_bits_truncate(0o750))?;
                openat2(current.as_fd(), part, how())?
            }
            Err(error) => return Err(error.into()),
        };
    }
    Ok(current)
}

/// Takes all of a pod's sub-paths away again. Blocks on the file system.
pub(crate) fn remove_all(root_dir: &Path, pod_uid: &str) -> io::Result<()> {
    let folder = folder(root_dir, pod_uid);
    let Ok(containers) = fs::read_dir(&folder) else { return Ok(()) };
    for container in containers {
        let container = container?.path();
        for bound in fs::read_dir(&container)? {
            let bound = bound?.path();
            let _ = umount2(&bound, MntFlags::MNT_DETACH);
            // never recursively: if the bind were still there, its content would go
            if bound.is_dir() { fs::remove_dir(&bound)? } else { fs::remove_file(&bound)? }
        }
        fs::remove_dir(&container)?;
    }
    fs::remove_dir(&folder)
}
