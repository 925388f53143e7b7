//! This program, as a file that nobody who runs it can write to.
//!
//! A helper is this program inside a container's namespaces. A container could reach the file of it
//! through `/proc/PID/exe`, keep it open, and write to it once nobody runs it any more: the host's
//! binary would be the container's (CVE-2019-5736 is this hole in runc). So helpers are started from
//! a mount of their own that is read-only and has no place in any tree of folders; it is gone with
//! the descriptor. It also stays right when the file is replaced by an upgrade.

use std::{
    ffi::{CStr, OsStr},
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

use crate::runtime::{Result, RuntimeError};

/// The running program.
const SELF: &CStr = c"/proc/self/exe";

/// A descriptor of the running program that can be run and read, never written.
///
/// # Errors
/// The kernel can give neither a mount (before Linux 5.12, or without `CAP_SYS_ADMIN`) nor memory
/// for a copy.
pub(super) fn read_only_self() -> Result<OwnedFd> {
    match mounted(SELF) {
        Ok(program) => Ok(program),
        Err(error) => {
            tracing::debug!(%error, "no read-only mount of the program is to be had; copying it");
            copied(SELF).map_err(|source| RuntimeError::Io {
                what: "making a copy of the program that containers can't write to".into(),
                source,
            })
        }
    }
}

/// A read-only mount of the file alone (open_tree(2), mount_setattr(2)).
fn mounted(path: &CStr) -> io::Result<OwnedFd> {
    let program = {
        let flags = libc::OPEN_TREE_CLONE as libc::c_uint | libc::O_CLOEXEC as libc::c_uint;
        // SAFETY: the path ends in NUL.
        let fd =
            unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the call has just made this descriptor, and nobody else knows it.
        unsafe { OwnedFd::from_raw_fd(fd) }
    };
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the descriptor and the structure outlive the call, and the size is the structure's.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            program.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(program)
}

/// A copy in memory that is sealed against any change (memfd_create(2)).
fn copied(path: &CStr) -> io::Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name ends in NUL; a descriptor that the call makes is nobody else's.
    let mut copy = unsafe {
        let fd = libc::memfd_create(c"keelson".as_ptr(), flags);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    io::copy(&mut File::open(OsStr::from_bytes(path.to_bytes()))?, &mut copy)?;
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: a plain system call on a descriptor that we hold.
    if unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_ADD_SEALS, seals) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(copy.into())
}

#[cfg(test)]
mod tests {
    use std::{ffi::CString, fs::OpenOptions, io::Write, process::Command};

    use super::*;

    fn check(program: &OwnedFd, what: &str) {
        let path = format!("/proc/{}/fd/{}", std::process::id(), program.as_raw_fd());
        assert!(Command::new(&path).status().unwrap().success(), "{what}");
        // A descriptor for writing may be had of what is sealed; writing to it fails.
        let written =
            OpenOptions::new().write(true).open(&path).and_then(|mut file| file.write_all(b"mine"));
        let code = written.unwrap_err().raw_os_error();
        assert!(matches!(code, Some(libc::EROFS | libc::EPERM)), "{what}: {code:?}");
    }

    #[test]
    fn it_can_be_run_and_not_written() {
        // Not this program: what runs can't be written to anyway.
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        std::fs::copy("/bin/true", &program).unwrap();
        let path = CString::new(program.as_os_str().as_bytes()).unwrap();
        check(&copied(&path).unwrap(), "a copy");
        // Without the right to mount there is only the copy.
        match mounted(&path) {
            Ok(program) => check(&program, "a mount"),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPERM)),
        }
        assert!(OpenOptions::new().write(true).open(&program).is_ok());
    }
}
