//! Which pod has which address: one file for each, named by the address, with the sandbox in it.
//!
//! Making the file is taking the address, so two that ask at once can't get the same; the files are
//! all there is to know after a restart. Addresses go round: one that was just given back is the last
//! to be given again, for others may still hold connections or caches of it.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use ipnet::Ipv4Net;

use super::InUse;
use crate::runtime::{Result, RuntimeError, SandboxId};

/// The file with the address that was given last. It is no address itself.
const LAST: &str = "last";

pub(super) struct Addresses {
    dir: PathBuf,
    last: Mutex<Option<Ipv4Addr>>,
}

impl Addresses {
    pub(super) fn open(dir: &Path) -> Result<Addresses> {
        fs::create_dir_all(dir).map_err(|e| failed(dir, e))?;
        let last = fs::read_to_string(dir.join(LAST)).ok().and_then(|t| t.trim().parse().ok());
        Ok(Addresses { dir: dir.to_owned(), last: Mutex::new(last) })
    }

    /// Takes a free address of the ranges for a sandbox.
    pub(super) fn take(&self, ranges: &[Ipv4Net], sandbox: &SandboxId) -> Result<Ipv4Addr> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = ranges
            .iter()
            .flat_map(|r| candidates(*r))
            .skip_while(|a| last.is_some_and(|last| contains(ranges, last) && *a != last));
        // Behind the last one first, then from the beginning.
        let after: Vec<Ipv4Addr> = all.by_ref().skip(usize::from(last.is_some())).collect();
        let again = ranges.iter().flat_map(|r| candidates(*r));
        for address in after.into_iter().chain(again) {
            let path = self.dir.join(address.to_string());
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(mut file) => {
                    file.write_all(sandbox.as_str().as_bytes()).map_err(|e| failed(&path, e))?;
                    *last = Some(address);
                    // Only a hint: without it the round begins anew.
                    let _ = fs::write(self.dir.join(LAST), address.to_string());
                    return Ok(address);
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(failed(&path, e)),
            }
        }
        Err(RuntimeError::Container(format!(
            "the pod's network: all addresses of {} are in use",
            ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        )))
    }

    /// Gives back all addresses of a sandbox.
    pub(super) fn release(&self, sandbox: &SandboxId) -> Result<()> {
        self.remove_if(|owner, _| owner == sandbox.as_str())
    }

    /// Gives back all addresses but those of these sandboxes, and takes theirs if they are missing.
    pub(super) fn keep_only(&self, in_use: &[InUse]) -> Result<()> {
        self.remove_if(|owner, address| {
            !in_use.iter().any(|s| {
                s.sandbox.as_str() == owner && s.addresses.iter().any(|a| a.to_string() == address)
            })
        })?;
        for sandbox in in_use {
            for address in &sandbox.addresses {
                let path = self.dir.join(address.to_string());
                if !path.exists() {
                    fs::write(&path, sandbox.sandbox.as_str()).map_err(|e| failed(&path, e))?;
                }
            }
        }
        Ok(())
    }

    fn remove_if(&self, gone: impl Fn(&str, &str) -> bool) -> Result<()> {
        for entry in fs::read_dir(&self.dir).map_err(|e| failed(&self.dir, e))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name == LAST {
                continue;
            }
            let owner = fs::read_to_string(entry.path()).unwrap_or_default();
            if gone(owner.trim(), &name) {
                fs::remove_file(entry.path()).map_err(|e| failed(&entry.path(), e))?;
            }
        }
        Ok(())
    }
}

fn failed(path: &Path, source: io::Error) -> RuntimeError {
    RuntimeError::Io { what: format!("keeping the pods' addresses: {}", path.display()), source }
}

fn contains(ranges: &[Ipv4Net], address: Ipv4Addr) -> bool {
    ranges.iter().any(|r| r.contains(&address))
}

/// The addresses of a range that a pod may have: not the first two (the range's own name, and the
/// one that is commonly taken for a gateway) and not the last (broadcast), as far as there are more.
fn candidates(range: Ipv4Net) -> impl Iterator<Item = Ipv4Addr> {
    let (first, last) = (u32::from(range.network()), u32::from(range.broadcast()));
    let (from, to) = if last - first >= 7 { (first + 2, last - 1) } else { (first, last) };
    (from..=to).map(Ipv4Addr::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> SandboxId {
        SandboxId(name.to_owned())
    }

    #[test]
    fn addresses_go_round_and_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let ranges = ["10.0.0.0/29".parse().unwrap()];
        let take = |addresses: &Addresses, name: &str| {
            addresses.take(&ranges, &id(name)).map(|a| a.octets()[3])
        };
        let addresses = Addresses::open(dir.path()).unwrap();
        assert_eq!(take(&addresses, "a").unwrap(), 2);
        assert_eq!(take(&addresses, "b").unwrap(), 3);
        addresses.release(&id("a")).unwrap();
        let addresses = Addresses::open(dir.path()).unwrap();
        assert_eq!(take(&addresses, "c").unwrap(), 4);
        assert_eq!(take(&addresses, "d").unwrap(), 5);
        assert_eq!(take(&addresses, "e").unwrap(), 6);
        assert_eq!(take(&addresses, "f").unwrap(), 2);
        let error = take(&addresses, "g").unwrap_err().to_string();
        assert!(error.contains("10.0.0.0/29"), "{error}");
        addresses.release(&id("d")).unwrap();
        assert_eq!(take(&addresses, "h").unwrap(), 5);
    }

    #[test]
    fn only_addresses_of_known_sandboxes_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let addresses = Addresses::open(dir.path()).unwrap();
        let ranges = ["10.0.0.0/24".parse().unwrap()];
        let kept = addresses.take(&ranges, &id("a")).unwrap();
        addresses.take(&ranges, &id("b")).unwrap();
        let in_use = InUse { sandbox: id("a"), addresses: vec![kept.into()], ports: Vec::new() };
        addresses.keep_only(&[in_use]).unwrap();
        let files: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().collect();
        assert_eq!(files.len(), 2);
        assert!(dir.path().join(kept.to_string()).exists());
    }
}
