//! Which capabilities a container gets.

use std::collections::BTreeSet;

use super::SpecError;

/// All capabilities of Linux, by their number in the kernel (capabilities(7)).
const ALL: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What a container has if nothing else is asked for: the set that container runtimes agree on and
/// that Kubernetes documents `capabilities.add` and `.drop` against.
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// The names of the capabilities whose bits are set, as in `CapBnd` of `/proc/self/status`.
pub(crate) fn from_bits(bits: u64) -> BTreeSet<&'static str> {
    ALL.iter().enumerate().filter(|(at, _)| bits >> at & 1 == 1).map(|(_, name)| *name).collect()
}

/// The container's set: the default, changed as asked, out of those that the runtime itself has.
///
/// Additions win over `drop: [ALL]`, as Kubernetes documents; a named capability that is both added
/// and dropped is dropped. A capability by name that the runtime does not have is an error, whereas
/// `ALL` means all that it has.
pub(crate) fn resolve(
    privileged: bool,
    add: &[String],
    drop: &[String],
    available: &BTreeSet<&'static str>,
) -> Result<BTreeSet<&'static str>, SpecError> {
    let add = names(add)?;
    let drop = names(drop)?;
    let all = |set: &[Option<&'static str>]| set.iter().any(Option::is_none);
    if privileged {
        return Ok(available.clone());
    }
    let mut set: BTreeSet<&'static str> = if all(&add) {
        available.clone()
    } else if all(&drop) {
        BTreeSet::new()
    } else {
        DEFAULT.into_iter().filter(|c| available.contains(c)).collect()
    };
    if all(&add) && all(&drop) {
        set.clear();
    }
    for name in drop.iter().flatten() {
        set.remove(name);
    }
    for name in add.iter().flatten() {
        if drop.contains(&Some(*name)) {
            continue;
        }
        if !available.contains(name) {
            return Err(SpecError::Unavailable(format!(
                "capability CAP_{name}: the runtime does not have it itself, so it can't give it to \
                 a container"
            )));
        }
        set.insert(name);
    }
    Ok(set)
}

/// The canonical names; `None` stands for `ALL`.
fn names(given: &[String]) -> Result<Vec<Option<&'static str>>, SpecError> {
    given
        .iter()
        .map(|name| {
            let upper = name.to_ascii_uppercase();
            let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
            if short == "ALL" {
                return Ok(None);
            }
            ALL.iter().find(|known| **known == short).map(|known| Some(*known)).ok_or_else(|| {
                SpecError::Invalid(format!("capability {name:?}: there is none of this name"))
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(add: &[&str], drop: &[&str]) -> Vec<&'static str> {
        let own = |names: &[&str]| names.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let all = from_bits(u64::MAX);
        resolve(false, &own(add), &own(drop), &all).unwrap().into_iter().collect()
    }

    #[test]
    fn sets_are_changed_as_asked() {
        assert_eq!(resolved(&[], &[]).len(), 14);
        assert_eq!(resolved(&["NET_ADMIN"], &[]).len(), 15);
        assert_eq!(resolved(&[], &["CAP_CHOWN"]).len(), 13);
        assert_eq!(resolved(&["net_bind_service"], &["ALL"]), ["NET_BIND_SERVICE"]);
        assert_eq!(resolved(&["ALL"], &[]).len(), 41);
        assert_eq!(resolved(&["ALL"], &["SYS_ADMIN"]).len(), 40);
        assert_eq!(resolved(&["KILL"], &["KILL"]).len(), 13);
    }

    #[test]
    fn what_the_runtime_lacks_is_refused_by_name_and_left_out_of_all() {
        let all = from_bits(!(1 << 24));
        assert!(!all.contains("SYS_RESOURCE"));
        let set = resolve(true, &[], &[], &all).unwrap();
        assert_eq!(set.len(), 40);
        let error = resolve(false, &["SYS_RESOURCE".to_owned()], &[], &all).unwrap_err();
        assert!(error.to_string().contains("CAP_SYS_RESOURCE"), "{error}");
        let error = resolve(false, &["SYS_RESORCE".to_owned()], &[], &all).unwrap_err();
        assert!(error.to_string().contains("SYS_RESORCE"), "{error}");
    }
}
