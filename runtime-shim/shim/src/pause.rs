//! The first process of a pod whose containers share one process namespace.
//!
//! It does nothing but take away the dead. Containers see it as process 1, and one that may trace
//! others may look through it (`/proc/1/root`), so nothing must be behind it: it has an empty root
//! that can't be written to, no capability, and no trace of the shim's arguments.

use std::{
    fs::File,
    io::{self, Read},
    mem::zeroed,
    os::fd::AsRawFd,
    ptr,
};

use crate::sys;

/// Its name, for `ps`.
const NAME: &core::ffi::CStr = c"keelson-pause";
/// Nobody: neither root nor anyone whom an image is likely to have.
const USER: libc::uid_t = 65_535;
/// `_LINUX_CAPABILITY_VERSION_3` (capget(2)).
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// Makes the process, with a new process namespace; its id is that in the shim's.
pub(crate) fn spawn() -> io::Result<i32> {
    let command_line = command_line()?;
    let (mut ready, report) = sys::pipe()?;
    let flags = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::SIGCHLD;
    // SAFETY: without CLONE_VM this is a fork; there is one thread, and the child makes only plain
    // system calls.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            sys::detach_stdio();
            // SAFETY: the child owns its memory, signal masks and descriptors; it never returns.
            unsafe {
                if let Err(error) = confine(command_line) {
                    let code = error.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes();
                    libc::write(report.as_raw_fd(), code.as_ptr().cast(), code.len());
                    libc::_exit(1);
                }
                let fine = 0_i32.to_ne_bytes();
                libc::write(report.as_raw_fd(), fine.as_ptr().cast(), fine.len());
                libc::close_range(0, libc::c_uint::MAX, 0);
                take_away_the_dead()
            }
        }
        pid => {
            drop(report);
            let mut code = [0; 4];
            let error = match ready.read_exact(&mut code) {
                Ok(()) if i32::from_ne_bytes(code) == 0 => {
                    return Ok(i32::try_from(pid).unwrap_or(0));
                }
                Ok(()) => io::Error::from_raw_os_error(i32::from_ne_bytes(code)),
                Err(error) => error,
            };
            Err(error)
        }
    }
}

/// Where the arguments and the environment of this process begin and end, from
/// `/proc/self/stat` (proc(5): fields 48 to 51).
fn command_line() -> io::Result<(usize, usize)> {
    let mut text = String::new();
    File::open("/proc/self/stat")?.read_to_string(&mut text)?;
    // The name, which may have anything in it, ends with the last bracket; the third field follows.
    let fields = text.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    let mut numbers = fields.split_ascii_whitespace().skip(45).map(|n| n.parse().unwrap_or(0));
    let (start, end) = (numbers.next().unwrap_or(0), numbers.nth(2).unwrap_or(0));
    if start == 0 || end < start {
        return Err(io::Error::other("/proc/self/stat does not say where the arguments are"));
    }
    Ok((start, end))
}

/// Leaves everything behind that a pause has no need of.
///
/// # Safety
/// `command_line` is that of this process, of which nobody uses the arguments or the environment
/// any more.
unsafe fn confine((start, end): (usize, usize)) -> io::Result<()> {
    let done = |result: libc::c_int| match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    };
    let no_data: *const libc::c_void = ptr::null();
    // SAFETY: plain system calls with constant texts that end in NUL, and the caller's promise.
    unsafe {
        let text = NAME.to_bytes();
        ptr::write_bytes(start as *mut u8, 0, end - start);
        if text.len() < end - start {
            ptr::copy_nonoverlapping(text.as_ptr(), start as *mut u8, text.len());
        }
        done(libc::prctl(libc::PR_SET_NAME, NAME.as_ptr()))?;

        // An empty root, which no path leads out of. `/proc` is there to be mounted on.
        let none = c"none".as_ptr();
        let private = libc::MS_REC | libc::MS_PRIVATE;
        done(libc::mount(none, c"/".as_ptr(), ptr::null(), private, no_data))?;
        let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        let size = c"size=4k,mode=555".as_ptr().cast();
        done(libc::mount(none, c"/proc".as_ptr(), c"tmpfs".as_ptr(), flags, size))?;
        done(libc::chdir(c"/proc".as_ptr()))?;
        let here = c".".as_ptr();
        if libc::syscall(libc::SYS_pivot_root, here, here) == -1 {
            return Err(io::Error::last_os_error());
        }
        done(libc::umount2(here, libc::MNT_DETACH))?;
        done(libc::chdir(c"/".as_ptr()))?;
        let read_only = flags | libc::MS_REMOUNT | libc::MS_RDONLY;
        done(libc::mount(none, c"/".as_ptr(), ptr::null(), read_only, no_data))?;

        for capability in 0..64 {
            // Ends with the first that the kernel doesn't know.
            if libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) == -1 {
                break;
            }
        }
        done(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))?;
        done(libc::setgroups(0, ptr::null()))?;
        done(libc::setresgid(USER, USER, USER))?;
        done(libc::setresuid(USER, USER, USER))?;
        let header: [u32; 2] = [CAPABILITY_VERSION, 0];
        let none_at_all = [0_u32; 6];
        if libc::syscall(libc::SYS_capset, header.as_ptr(), none_at_all.as_ptr()) == -1 {
            return Err(io::Error::last_os_error());
        }
        done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        done(libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0))
    }
}

/// Waits for the ends of processes whose parents are gone, until it is told to end.
///
/// # Safety
/// Nothing else in this process uses signals.
unsafe fn take_away_the_dead() -> ! {
    // SAFETY: the set is initialized before it is used, and outlives the calls.
    unsafe {
        let mut set: libc::sigset_t = zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT] {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
        loop {
            let mut signal = 0;
            libc::sigwait(&raw const set, &raw mut signal);
            if signal != libc::SIGCHLD {
                libc::_exit(0);
            }
            while libc::waitpid(-1, ptr::null_mut(), libc::WNOHANG) > 0 {}
        }
    }
}
