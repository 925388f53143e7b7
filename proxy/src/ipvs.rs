//! What kube-proxy's ipvs mode leaves behind on a node.
//!
//! Its chains in iptables' tables go with the other ones ([`crate::iptables`]). Here it is about the
//! interface that has all cluster addresses, which would make each of them the node's own for ever,
//! and the sets that its rules looked into. Virtual servers are left alone, since nothing tells
//! kube-proxy's from those of a load balancer on the same node: they are named.

use std::{io, path::Path, process::Command};

use crate::{ProxyError, rtnl::failed};

/// The interface that has the addresses of Services.
const INTERFACE: &str = "kube-ipvs0";
/// All its sets are named so.
const SETS: &str = "KUBE-";
/// What lists virtual servers, in the network namespace of the calling thread.
const SERVERS: &str = "/proc/thread-self/net/ip_vs";
/// The lines at the beginning of that list.
const HEADER: usize = 3;

/// Removes the interface and the sets, in the network namespace of the calling thread; it is no
/// error if there are none.
///
/// # Errors
/// When the interface can't be removed.
pub(crate) fn remove_leftovers() -> Result<(), ProxyError> {
    match nix::net::if_::if_nametoindex(INTERFACE) {
        Ok(index) => {
            remove_interface(index).map_err(|source| ProxyError::Io {
                doing: "remove the interface kube-ipvs0",
                source,
            })?;
            tracing::info!("{INTERFACE}, the interface of kube-proxy's ipvs mode, is removed");
        }
        Err(nix::errno::Errno::ENODEV) => {}
        Err(errno) => {
            return Err(ProxyError::Io { doing: "look for kube-ipvs0", source: errno.into() });
        }
    }
    let servers = std::fs::read_to_string(SERVERS).unwrap_or_default();
    if servers.lines().nth(HEADER).is_some() {
        tracing::warn!(
            "there are virtual servers of ipvs on this node; if they are kube-proxy's, remove them \
             with `ipvsadm --clear`"
        );
    }
    Ok(())
}

/// Removes the sets once no rule of iptables looks into them any more.
pub(crate) fn remove_sets() {
    if let Err(error) = remove_sets_by(Path::new("ipset"))
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, "the sets of kube-proxy's ipvs mode stay");
    }
}

fn remove_sets_by(program: &Path) -> io::Result<()> {
    let run = |arguments: &[&str]| {
        let output = Command::new(program).args(arguments).env("LC_ALL", "C").output()?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    };
    let mut result = Ok(());
    for set in run(&["list", "-n"])?.lines().filter(|set| set.starts_with(SETS)) {
        match run(&["destroy", set]) {
            Ok(_) => tracing::info!(set, "a set of kube-proxy's ipvs mode is removed"),
            Err(error) => result = Err(error),
        }
    }
    result
}

fn remove_interface(index: u32) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        handle.link().del(index).execute().await.map_err(failed)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::netns::Namespace;

    #[test]
    fn the_interface_and_the_sets_go() {
        let host = Namespace::new();
        // Not every kernel has dummies; only the name counts.
        host.sh("ip link add kube-ipvs0 type bridge; ip addr add 10.96.0.1/32 dev kube-ipvs0");
        host.run(|| remove_leftovers().unwrap());
        assert!(!host.sh("ip -o link").contains("kube-ipvs0"));
        host.run(|| remove_leftovers().unwrap());

        let dir = tempfile::tempdir().unwrap();
        let (program, log) = (dir.path().join("ipset"), dir.path().join("log"));
        let script = format!(
            "#!/bin/sh\nif [ $1 = list ]; then printf 'KUBE-CLUSTER-IP\\nmine\\nKUBE-6-CLUSTER-IP\\n'\n\
             else echo $* >> {}; fi\n",
            log.display()
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        remove_sets_by(&program).unwrap();
        let destroyed = std::fs::read_to_string(&log).unwrap();
        assert_eq!(destroyed, "destroy KUBE-CLUSTER-IP\ndestroy KUBE-6-CLUSTER-IP\n");
        let missing = remove_sets_by(&dir.path().join("nothing")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
