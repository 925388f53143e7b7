//! The system calls that the standard library has no face for.

use std::{
    fs::File,
    io,
    mem::{size_of, zeroed},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    os::unix::net::UnixStream,
    ptr,
};

/// The most descriptors in one message.
const MAX_FDS: usize = 4;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A pipe: the end to read from, the end to write to. Both close on exec.
pub(crate) fn pipe() -> io::Result<(File, File)> {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for the two descriptors.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    // SAFETY: the kernel has just given both to us.
    Ok(unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) })
}

/// Makes reads and writes of this end return instead of wait.
pub(crate) fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: fcntl on an open descriptor, without pointers.
    unsafe {
        let flags = check(libc::fcntl(fd, libc::F_GETFL))?;
        check(libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK))?;
    }
    Ok(())
}

/// Sets the size of a terminal by its master.
pub(crate) fn set_terminal_size(fd: RawFd, width: u16, height: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the ioctl reads the structure that it is given.
    check(unsafe { libc::ioctl(fd, libc::TIOCSWINSZ, &raw const size) })?;
    Ok(())
}

/// Points the standard streams at `/dev/null`.
pub(crate) fn detach_stdio() {
    // SAFETY: the path ends in NUL; the descriptors are ours.
    unsafe {
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        if null >= 0 {
            for fd in 0..3 {
                libc::dup2(null, fd);
            }
            if null > 2 {
                libc::close(null);
            }
        }
    }
}

/// Blocks `SIGCHLD` and gives the descriptor on which it is seen.
pub(crate) fn child_signals() -> io::Result<File> {
    // SAFETY: the set is ours and initialised before use.
    unsafe {
        let mut set: libc::sigset_t = zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(File::from_raw_fd(fd))
    }
}

/// A child that has ended, if there is one: its process and its exit code (128 + a signal).
pub(crate) fn reap() -> Option<(i32, i32)> {
    loop {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid <= 0 {
            return None;
        }
        if libc::WIFEXITED(status) {
            return Some((pid, libc::WEXITSTATUS(status)));
        }
        if libc::WIFSIGNALED(status) {
            return Some((pid, 128 + libc::WTERMSIG(status)));
        }
    }
}

/// Sends a signal.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    if pid <= 1 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: no pointers.
    check(unsafe { libc::kill(pid, signal) })?;
    Ok(())
}

/// Nanoseconds since 1970.
pub(crate) fn now() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

/// Room for the control message of up to [`MAX_FDS`] descriptors, aligned as the kernel wants it.
#[repr(align(8))]
struct Control([u8; 64]);

/// Sends bytes, and descriptors beside the first of them.
pub(crate) fn send(socket: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<usize> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).take(MAX_FDS).collect();
    let mut control = Control([0; 64]);
    let mut io = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: all pointers are to locals that outlive the call; the control room is large enough
    // for MAX_FDS descriptors (a 16 byte header and 16 bytes).
    unsafe {
        let mut message: libc::msghdr = zeroed();
        message.msg_iov = &raw mut io;
        message.msg_iovlen = 1;
        if !raw.is_empty() {
            let length = u32::try_from(size_of::<RawFd>() * raw.len()).unwrap_or(0);
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(length) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(length) as _;
            ptr::copy_nonoverlapping(
                raw.as_ptr().cast::<u8>(),
                libc::CMSG_DATA(header),
                size_of::<RawFd>() * raw.len(),
            );
        }
        let sent = libc::sendmsg(
            socket.as_raw_fd(),
            &raw const message,
            libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
        );
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(sent.unsigned_abs()) }
    }
}

/// Receives bytes, and the descriptors that come with them.
pub(crate) fn receive(
    socket: &UnixStream,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut control = Control([0; 64]);
    let mut io = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all pointers are to locals that outlive the call; the control messages are walked
    // with the C library's own macros; each descriptor received is owned exactly once.
    unsafe {
        let mut message: libc::msghdr = zeroed();
        message.msg_iov = &raw mut io;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = control.0.len() as _;
        let got = libc::recvmsg(
            socket.as_raw_fd(),
            &raw mut message,
            libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT,
        );
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                #[allow(clippy::unnecessary_cast)] // the field's type differs between C libraries
                let length = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for at in 0..length / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(at).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
        Ok(got.unsigned_abs())
    }
}
