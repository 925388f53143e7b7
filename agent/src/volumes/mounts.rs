//! Mounts below the kubelet's folder: making them, finding them again, and taking them away
//! without ever deleting what is behind one.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::Mode,
    unistd::{UnlinkatFlags, unlinkat},
};

/// Mounts memory at a folder, if that is not done yet.
///
/// What is in it never goes to swap where the kernel can promise that (Linux 6.4): it may be secret.
pub(crate) fn mount_memory(path: &Path, limit: Option<u64>, mode: u32) -> io::Result<()> {
    if is_mount_point(path)? {
        return Ok(());
    }
    let size = limit.map(|bytes| format!(",size={bytes}")).unwrap_or_default();
    let options = format!("mode={mode:o}{size}");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let attempt = |options: &str| mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some(options));
    match attempt(&format!("{options},noswap")) {
        Err(Errno::EINVAL) => Ok(attempt(&options)?),
        outcome => Ok(outcome?),
    }
}

/// Binds what an open descriptor is to a path.
pub(crate) fn bind(from: BorrowedFd<'_>, to: &Path) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let from = format!("/proc/self/fd/{}", from.as_raw_fd());
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    Ok(mount(Some(from.as_str()), to, None::<&str>, flags, None::<&str>)?)
}

/// Takes away whatever is mounted at a path, even if somebody still uses it.
pub(crate) fn unmount(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // Not a mount point any more, or never there.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether something is mounted at exactly this path, which must be canonical.
pub(crate) fn is_mount_point(path: &Path) -> io::Result<bool> {
    Ok(mount_points()?.iter().any(|mounted| mounted == path))
}

/// All mount points at or below a folder, the deepest and latest first.
pub(crate) fn mounts_below(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut below: Vec<PathBuf> =
        mount_points()?.into_iter().filter(|mounted| mounted.starts_with(folder)).collect();
    // They are listed in the order of mounting.
    below.reverse();
    Ok(below)
}

fn mount_points() -> io::Result<Vec<PathBuf>> {
    // The threads of one process may be in several mount namespaces; this is about its own.
    Ok(parse(&fs::read("/proc/thread-self/mountinfo")?))
}

/// The fifth field of each line; spaces and the like are octal there (proc(5)).
fn parse(mountinfo: &[u8]) -> Vec<PathBuf> {
    let lines = mountinfo.split(|b| *b == b'\n');
    let fields = lines.filter_map(|line| line.split(|b| *b == b' ').nth(4));
    fields.map(|field| PathBuf::from(OsString::from_vec(unescape(field)))).collect()
}

fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, others)) = rest.split_first() {
        let digits =
            others.get(..3).filter(|digits| digits.iter().all(|d| (b'0'..b'8').contains(d)));
        match digits {
            Some(digits) if *first == b'\\' => {
                let value = digits.iter().fold(0u32, |sum, d| sum * 8 + u32::from(d - b'0'));
                plain.push(u8::try_from(value).unwrap_or(b'?'));
                rest = &others[3..];
            }
            _ => {
                plain.push(*first);
                rest = others;
            }
        }
    }
    plain
}

/// Unmounts all below a folder, and removes it with its content.
///
/// # Errors
/// Something could not be unmounted, or removed; nothing behind a mount point is touched.
pub(crate) fn remove_tree(folder: &Path) -> io::Result<()> {
    for mounted in mounts_below(folder)? {
        unmount(&mounted)?;
    }
    if let Some(left) = mounts_below(folder)?.first() {
        let reason = format!("{} is still mounted", left.display());
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, reason));
    }
    let (Some(parent), Some(name)) = (folder.parent(), folder.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the root is not a pod's folder"));
    };
    let parent = match open(parent, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(()),
        parent => parent?,
    };
    remove(&parent, name)
}

fn remove(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::EISDIR) => {}
        Err(errno) => return Err(errno.into()),
    }
    // Not across a mount point, bind mounts included, even if one was made just now.
    let how = OpenHow::new()
        .flags(OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let folder = openat2(parent, name, how)?;
    let mut entries = Dir::from_fd(folder.as_fd().try_clone_to_owned()?)?;
    let names = entries
        .iter()
        .map(|entry| entry.map(|entry| entry.file_name().to_owned()))
        .collect::<Result<Vec<_>, _>>()?;
    for name in names.iter().filter(|name| !matches!(name.to_bytes(), b"." | b"..")) {
        remove(&folder, OsStr::from_bytes(name.to_bytes()))?;
    }
    match unlinkat(parent, name, UnlinkatFlags::RemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_with_their_escapes() {
        let text = b"36 35 98:0 /m /mnt/a\\040b\\134c rw - tmpfs t rw\n37 35 0:1 / / rw - x y z\n";
        let found = parse(text);
        assert_eq!(found, [PathBuf::from("/mnt/a b\\c"), PathBuf::from("/")]);
        assert!(parse(b"\n\nshort line\n").is_empty());
    }
}
