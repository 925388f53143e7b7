//! A container's root file system: an overlay of its image's layers, and safe looks inside it.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{Mode, mkdirat},
};

use super::disk::failed;
use crate::runtime::{Result, RuntimeError};

/// The kernel takes one page of mount options.
const MAX_OPTIONS: usize = 4095;
/// More of an account file is not read.
const MAX_ACCOUNT_FILE: u64 = 4 << 20;

/// Mounts the layers (bottom first) with a writable folder over them at `<dir>/rootfs`.
pub(super) fn mount_overlay(layers: &[PathBuf], dir: &Path) -> Result<()> {
    let (rootfs, upper, work) = (dir.join("rootfs"), dir.join("upper"), dir.join("work"));
    for path in [&rootfs, &upper, &work] {
        fs::create_dir_all(path).map_err(failed("making", path))?;
    }
    if layers.is_empty() {
        // An image without files is an empty folder.
        return mount(Some(&upper), &rootfs, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(|e| failed("mounting", &rootfs)(e.into()));
    }
    let lower: Vec<String> = layers.iter().rev().map(|l| escaped(l)).collect();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.join(":"),
        escaped(&upper),
        escaped(&work)
    );
    let result = if options.len() <= MAX_OPTIONS {
        mount(Some("overlay"), &rootfs, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .map_err(io::Error::from)
    } else {
        mount_many_layers(layers, &upper, &work, &rootfs)
    };
    result.map_err(|source| RuntimeError::Io {
        what: format!("mounting {} layers at {}", layers.len(), rootfs.display()),
        source,
    })
}

/// `:` and `,` separate layers and options.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,")
}

/// Mounts an overlay whose layers' names are longer than a page together: one call for each.
fn mount_many_layers(layers: &[PathBuf], upper: &Path, work: &Path, at: &Path) -> io::Result<()> {
    let c = |path: &Path| {
        CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
    };
    let check = |result: libc::c_long| {
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
    };
    // SAFETY: each pointer is to a string that ends in NUL and outlives its call; descriptors are
    // owned as soon as they are known.
    unsafe {
        let context = check(libc::syscall(libc::SYS_fsopen, c"overlay".as_ptr(), 1))?;
        let context = OwnedFd::from_raw_fd(raw(context));
        let set = |key: &std::ffi::CStr, value: io::Result<CString>| -> io::Result<()> {
            let value = value?;
            // 1 is FSCONFIG_SET_STRING.
            check(libc::syscall(
                libc::SYS_fsconfig,
                context.as_raw_fd(),
                1,
                key.as_ptr(),
                value.as_ptr(),
                0,
            ))?;
            Ok(())
        };
        for layer in layers.iter().rev() {
            set(c"lowerdir+", c(layer)).map_err(|e| {
                io::Error::new(
                    e.kind(),
                    format!("this kernel can't stack as many layers one by one ({e})"),
                )
            })?;
        }
        set(c"upperdir", c(upper))?;
        set(c"workdir", c(work))?;
        // 6 is FSCONFIG_CMD_CREATE.
        let none = std::ptr::null::<libc::c_char>();
        check(libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), 6, none, none, 0))?;
        let mounted = check(libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, 0))?;
        let mounted = OwnedFd::from_raw_fd(raw(mounted));
        let at = c(at)?;
        // 4 is MOVE_MOUNT_F_EMPTY_PATH.
        check(libc::syscall(
            libc::SYS_move_mount,
            mounted.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            at.as_ptr(),
            4,
        ))?;
    }
    Ok(())
}

fn raw(descriptor: libc::c_long) -> i32 {
    i32::try_from(descriptor).unwrap_or(-1)
}

/// Takes a mount away; nothing there is as good.
pub(super) fn unmount(path: &Path) -> Result<bool> {
    let mut any = false;
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => any = true,
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(any),
            Err(e) => return Err(failed("unmounting", path)(e.into())),
        }
    }
}

/// Opens a path inside a root file system; links and `..` can't lead out of it.
fn open_inside(root: &Path, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let dir = File::open(root)?;
    open_below(&dir, path, flags)
}

fn open_below<Fd: std::os::fd::AsFd>(dir: &Fd, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(dir, path, how).map_err(io::Error::from)
}

/// The text of a file inside a root file system; empty if there is none.
pub(super) fn read_inside(root: &Path, path: &str) -> Result<String> {
    let opened = open_inside(root, Path::new(path), OFlag::O_RDONLY | OFlag::O_NONBLOCK);
    let file = match opened {
        Ok(fd) => File::from(fd),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            return Ok(String::new());
        }
        Err(e) => return Err(failed("reading the image's", Path::new(path))(e)),
    };
    if !file.metadata().is_ok_and(|m| m.is_file()) {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    file.take(MAX_ACCOUNT_FILE)
        .read_to_end(&mut bytes)
        .map_err(failed("reading the image's", Path::new(path)))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Makes a folder, and those above it, inside a root file system.
pub(super) fn make_dir_inside(root: &Path, path: &Path) -> Result<()> {
    if open_inside(root, path, OFlag::O_PATH | OFlag::O_DIRECTORY).is_ok() {
        return Ok(());
    }
    let what = failed("making the working directory", path);
    let mut at = PathBuf::from("/");
    for component in path.components() {
        let Component::Normal(name) = component else { continue };
        let parent = open_inside(root, &at, OFlag::O_PATH | OFlag::O_DIRECTORY).map_err(&what)?;
        match mkdirat(&parent, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(e) => return Err(what(e.into())),
        }
        at.push(name);
    }
    open_inside(root, path, OFlag::O_PATH | OFlag::O_DIRECTORY).map_err(&what)?;
    Ok(())
}

/// Bytes and files below a folder, itself not counted.
pub(crate) fn disk_usage(dir: &Path) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    let (mut bytes, mut files) = (0, 0);
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            bytes += metadata.blocks() * 512;
            files += 1;
            if metadata.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    (bytes, files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_in_an_image_do_not_lead_out_of_it() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", root.path().join("etc/passwd")).unwrap();
        assert_eq!(read_inside(root.path(), "/etc/passwd").unwrap(), "");
        fs::write(root.path().join("etc/hostname"), "inside").unwrap();
        assert_eq!(read_inside(root.path(), "/etc/passwd").unwrap(), "inside");
        assert_eq!(read_inside(root.path(), "/etc/group").unwrap(), "");
        std::os::unix::fs::symlink("../../../..", root.path().join("up")).unwrap();
        make_dir_inside(root.path(), Path::new("/up/a/b")).unwrap();
        assert!(root.path().join("a/b").is_dir());
    }
}
