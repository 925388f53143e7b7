//! Network namespaces: making and removing them, and doing things inside.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};
use tokio::net::TcpStream;

use super::shown;
use crate::runtime::{InterfaceStats, Result, RuntimeError};

/// Runs something on a thread of its own, which may change its namespaces and then ends.
pub(super) async fn on_thread<T: Send + 'static>(
    what: String,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T> {
    let (tell, told) = tokio::sync::oneshot::channel();
    let spawned = std::thread::Builder::new().name("keelson-netns".into()).spawn(move || {
        // Whoever asked may be gone.
        let _ = tell.send(work());
    });
    let result = match spawned {
        Ok(_) => told.await.unwrap_or_else(|_| Err(io::Error::other("the thread panicked"))),
        Err(error) => Err(error),
    };
    result.map_err(|source| RuntimeError::Io { what, source })
}

/// Lets this thread enter a namespace.
pub(super) fn enter(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    setns(file, CloneFlags::CLONE_NEWNET)?;
    Ok(())
}

/// Makes a namespace that stays as long as its file.
pub(super) async fn create(path: &Path, sysctls: BTreeMap<String, String>) -> Result<()> {
    let path = path.to_owned();
    on_thread(format!("making the network namespace {}", shown(&path)), move || {
        File::create(&path)?;
        unshare(CloneFlags::CLONE_NEWNET)?;
        for (name, value) in &sysctls {
            fs::write(format!("/proc/sys/{name}"), value)
                .map_err(|e| io::Error::new(e.kind(), format!("sysctl {name} = {value}: {e}")))?;
        }
        let own = Some("/proc/thread-self/ns/net");
        mount(own, &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        Ok(())
    })
    .await
}

/// Removes a namespace's file. The namespace goes with the last process in it.
pub(super) async fn remove(path: &Path) -> Result<()> {
    let path = path.to_owned();
    on_thread(format!("removing the network namespace {}", shown(&path)), move || {
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    })
    .await
}

/// Connects to a port on the loopback of a namespace; of the host, if there is none.
pub(crate) async fn connect_inside(netns: Option<PathBuf>, port: u16) -> Result<TcpStream> {
    let stream = on_thread(format!("connecting to port {port} in the pod"), move || {
        if let Some(path) = netns {
            enter(&path)?;
        }
        let stream = std::net::TcpStream::connect(("127.0.0.1", port))
            .or_else(|first| std::net::TcpStream::connect(("::1", port)).map_err(|_| first))?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    })
    .await?;
    TcpStream::from_std(stream).map_err(|source| RuntimeError::Io {
        what: format!("connecting to port {port} in the pod"),
        source,
    })
}

/// The counters of the interfaces in a namespace, without the loopback. Blocks; nothing if the
/// namespace is gone.
pub(crate) fn interface_stats(netns: &Path) -> Vec<InterfaceStats> {
    let path = netns.to_owned();
    let read = std::thread::spawn(move || {
        enter(&path)?;
        fs::read_to_string("/proc/thread-self/net/dev")
    });
    match read.join() {
        Ok(Ok(text)) => parse(&text),
        _ => Vec::new(),
    }
}

fn parse(text: &str) -> Vec<InterfaceStats> {
    text.lines()
        .filter_map(|line| {
            let (name, counters) = line.split_once(':')?;
            let counters: Vec<u64> =
                counters.split_whitespace().map_while(|word| word.parse().ok()).collect();
            Some(InterfaceStats {
                name: name.trim().to_owned(),
                rx_bytes: *counters.first()?,
                rx_errors: *counters.get(2)?,
                tx_bytes: *counters.get(8)?,
                tx_errors: *counters.get(10)?,
            })
        })
        .filter(|interface| interface.name != "lo")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_their_columns() {
        let text = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  eth0:    1234       5    6    0    0     0          0         0     4321       7    8    0    0     0       0          0
";
        let expected = InterfaceStats {
            name: "eth0".into(),
            rx_bytes: 1234,
            rx_errors: 6,
            tx_bytes: 4321,
            tx_errors: 8,
        };
        assert_eq!(parse(text), [expected]);
    }
}
