//! The system call filter of `RuntimeDefault`, and profiles from files.
//!
//! The default allows what the default profile of container runtimes is documented to allow
//! (everything but what reaches into the kernel's own state, other namespaces or the machine), and
//! answers `EPERM` to the rest. What a capability is for is allowed to those who have it.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::SpecError;

/// Calls that everybody may make, for all architectures together: names that an architecture lacks
/// are passed over.
const ALLOWED: &str = "accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir \
    chmod chown chown32 clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 \
    clock_gettime clock_gettime64 clock_nanosleep clock_nanosleep_time64 close close_range connect \
    copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old \
    epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit \
    exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod \
    fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock \
    fork fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate \
    ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake futimesat \
    get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid getegid32 geteuid \
    geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid \
    getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage \
    getsid getsockname getsockopt gettid gettimeofday getuid getuid32 getxattr getxattrat \
    inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy \
    io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit ioctl ioprio_get ioprio_set \
    ipc kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lchown32 \
    lgetxattr link linkat listen listmount listxattr listxattrat llistxattr _llseek lremovexattr \
    lseek lsetxattr lstat lstat64 madvise map_shadow_stack membarrier memfd_create memfd_secret \
    mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mmap2 mprotect mq_getsetattr \
    mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 \
    mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap \
    name_to_handle_at nanosleep newfstatat _newselect open openat openat2 pause pidfd_open \
    pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl \
    pread64 preadv preadv2 prlimit64 process_mrelease process_vm_readv process_vm_writev pselect6 \
    pselect6_time64 ptrace pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recv \
    recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename \
    renameat renameat2 restart_syscall riscv_hwprobe rmdir rseq rt_sigaction rt_sigpending \
    rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait \
    rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min \
    sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval \
    sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam \
    sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop \
    semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto set_robust_list \
    set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 \
    setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid \
    setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit setsid setsockopt setuid \
    setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 \
    sigprocmask sigreturn socketcall socketpair splice stat stat64 statfs statfs64 statmount statx \
    symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create \
    timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 \
    timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill \
    truncate truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime utimensat \
    utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write writev";

/// Calls that go with a capability.
const WITH_CAPABILITY: [(&str, &str); 14] = [
    ("BPF", "bpf"),
    ("DAC_READ_SEARCH", "open_by_handle_at"),
    ("PERFMON", "perf_event_open"),
    (
        "SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount \
         mount_setattr move_mount open_tree perf_event_open quotactl quotactl_fd setdomainname \
         sethostname setns syslog umount umount2 unshare",
    ),
    ("SYS_BOOT", "reboot"),
    ("SYS_CHROOT", "chroot"),
    ("SYS_MODULE", "delete_module finit_module init_module"),
    ("SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("SYS_PACCT", "acct"),
    ("SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
    ("SYS_RAWIO", "ioperm iopl"),
    ("SYS_TIME", "clock_settime clock_settime64 settimeofday stime"),
    ("SYS_TTY_CONFIG", "vhangup"),
    ("SYSLOG", "syslog"),
];

/// Execution domains that do no harm (personality(2)): Linux and its 32-bit view, with and without
/// the machine name of a 2.6 kernel, and the question for the present one.
const PERSONALITIES: [u64; 5] = [0x0, 0x0008, 0x20000, 0x20008, 0xffff_ffff];
/// `AF_VSOCK`: it knows no namespaces, so a container would reach the hypervisor.
const AF_VSOCK: u64 = 40;
/// The flags of clone(2) that make namespaces.
const CLONE_NAMESPACES: u64 = 0x7E02_0000;
/// `ENOSYS`: the C library then falls back from clone3, whose flags a filter can't see, to clone.
const ENOSYS: u32 = 38;

/// The filter of `RuntimeDefault` for a container with these capabilities, on this architecture (as
/// `std::env::consts::ARCH` names it).
pub(crate) fn runtime_default(
    capabilities: &BTreeSet<&'static str>,
    architecture: &str,
) -> Result<Value, SpecError> {
    let (architectures, own): (&[&str], &[&str]) = match architecture {
        "x86_64" => {
            (&["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"], &["arch_prctl", "modify_ldt"])
        }
        "aarch64" => (
            &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
            &[
                "arm_fadvise64_64",
                "arm_sync_file_range",
                "sync_file_range2",
                "breakpoint",
                "cacheflush",
                "set_tls",
            ],
        ),
        "riscv64" => (&["SCMP_ARCH_RISCV64"], &["riscv_flush_icache"]),
        "powerpc64" => (&["SCMP_ARCH_PPC64LE"], &["sync_file_range2", "swapcontext"]),
        "s390x" => (
            &["SCMP_ARCH_S390X", "SCMP_ARCH_S390"],
            &["s390_pci_mmio_read", "s390_pci_mmio_write", "s390_runtime_instr"],
        ),
        other => {
            return Err(SpecError::Unavailable(format!(
                "the runtime's default seccomp profile: there is none for the architecture {other}; \
                 use a Localhost profile"
            )));
        }
    };
    let mut names: BTreeSet<&str> = ALLOWED.split_whitespace().collect();
    names.extend(own);
    for (capability, calls) in WITH_CAPABILITY {
        if capabilities.contains(capability) {
            names.extend(calls.split_whitespace());
        }
    }
    let mut rules = vec![
        json!({"names": names, "action": "SCMP_ACT_ALLOW"}),
        json!({
            "names": ["socket"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_NE"}],
        }),
    ];
    for value in PERSONALITIES {
        rules.push(json!({
            "names": ["personality"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}],
        }));
    }
    if !capabilities.contains("SYS_ADMIN") {
        // s390 has the arguments of clone in another order.
        let flags = if architecture == "s390x" { 1 } else { 0 };
        rules.push(json!({
            "names": ["clone"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{
                "index": flags,
                "value": CLONE_NAMESPACES,
                "valueTwo": 0,
                "op": "SCMP_CMP_MASKED_EQ",
            }],
        }));
        rules.push(json!({
            "names": ["clone3"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": ENOSYS,
        }));
    }
    Ok(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": architectures,
        "syscalls": rules,
    }))
}

/// A profile from a file, in the format of the OCI runtime specification.
///
/// What the filter can't hold is refused: an agent that is asked by the filter
/// (`SCMP_ACT_NOTIFY`), and a list without a default action.
pub(crate) fn from_file(text: &[u8], path: &str) -> Result<Value, SpecError> {
    let parsed: oci_spec::runtime::LinuxSeccomp = serde_json::from_slice(text)
        .map_err(|e| SpecError::Invalid(format!("seccomp profile {path}: {e}")))?;
    let notifies = parsed.listener_path().is_some()
        || parsed
            .syscalls()
            .iter()
            .flatten()
            .any(|s| s.action() == oci_spec::runtime::LinuxSeccompAction::ScmpActNotify);
    if notifies {
        return Err(SpecError::Unavailable(format!(
            "seccomp profile {path}: SCMP_ACT_NOTIFY is not supported"
        )));
    }
    serde_json::to_value(parsed)
        .map_err(|e| SpecError::Invalid(format!("seccomp profile {path}: {e}")))
}

/// Writes masked comparisons the way libcontainer reads them.
///
/// The OCI specification (and libseccomp) has the mask in `value` and what to compare with in
/// `valueTwo`; libcontainer 0.7 hands them to libseccomp the other way round, so that a rule like
/// that for `clone` would never match.
pub(crate) fn for_libcontainer(profile: &mut Value) {
    let rules = profile.get_mut("syscalls").and_then(Value::as_array_mut);
    for argument in rules
        .into_iter()
        .flatten()
        .filter_map(|rule| rule.get_mut("args").and_then(Value::as_array_mut))
        .flatten()
        .filter(|argument| argument["op"] == "SCMP_CMP_MASKED_EQ")
    {
        let mask = argument["value"].take();
        let compared = argument.get("valueTwo").filter(|v| !v.is_null()).cloned();
        argument["value"] = compared.unwrap_or_else(|| json!(0));
        argument["valueTwo"] = mask;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(profile: &Value, at: usize) -> Vec<&str> {
        profile["syscalls"][at]["names"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_str)
            .collect()
    }

    #[test]
    fn the_default_profile_is_understood_and_follows_the_capabilities() {
        let plain = runtime_default(&BTreeSet::new(), "x86_64").unwrap();
        serde_json::from_value::<oci_spec::runtime::LinuxSeccomp>(plain.clone()).unwrap();
        for call in ["mount", "unshare", "bpf", "chroot", "keyctl", "kexec_load", "io_uring_setup"]
        {
            assert!(!names(&plain, 0).contains(&call), "{call}");
        }
        assert!(names(&plain, 0).contains(&"arch_prctl"));
        let last = plain["syscalls"].as_array().unwrap().last().unwrap();
        assert_eq!(last["names"][0], "clone3");
        let able = runtime_default(&BTreeSet::from(["SYS_ADMIN", "SYS_CHROOT"]), "x86_64").unwrap();
        for call in ["mount", "unshare", "clone", "clone3", "chroot"] {
            assert!(names(&able, 0).contains(&call), "{call}");
        }
        assert!(runtime_default(&BTreeSet::new(), "vax").is_err());
    }

    #[test]
    fn a_profile_that_asks_an_agent_is_refused() {
        let text = br#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}]}"#;
        let error = from_file(text, "/p.json").unwrap_err();
        assert!(error.to_string().contains("SCMP_ACT_NOTIFY"), "{error}");
        assert!(from_file(b"{}", "/p.json").is_err());
        assert!(from_file(br#"{"defaultAction":"SCMP_ACT_ALLOW"}"#, "/p.json").is_ok());
    }
}
