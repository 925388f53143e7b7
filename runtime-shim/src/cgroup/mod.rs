//! Control groups, of both versions.
//!
//! A pod's cgroup is `<prefix>/<cgroup parent>`, its containers' are folders in it by their ids, and
//! all shims live together in `<prefix>/keelson-shims`, outside the agent's own. libcontainer writes
//! what concerns a new container; everything else (pods, changes, reading, killing, removing) is
//! here. Nothing else on the machine is touched: all paths are below the prefix.
//!
//! With version 1 each controller is a tree of its own, and the same relative path is used in all.

mod limits;
pub(crate) mod stats;

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Component, Path, PathBuf},
    time::{Duration, Instant},
};

/// The folder of the shims, below the prefix.
const SHIMS: &str = "keelson-shims";
/// How long a cgroup's processes have to be gone after they were killed.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// A mounted tree of cgroups.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    /// The last component of where it is mounted.
    folder: String,
    mount: PathBuf,
    controllers: BTreeSet<String>,
}

/// The cgroups of one runtime.
#[derive(Clone, Debug)]
pub(crate) struct Cgroups {
    prefix: PathBuf,
    v2: bool,
    hierarchies: Vec<Hierarchy>,
}

impl Cgroups {
    /// Finds the host's cgroups; `prefix` is the folder below each root that is ours.
    pub(crate) fn detect(prefix: &str) -> io::Result<Cgroups> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo")?;
        let mut cgroups = parse(&mountinfo);
        cgroups.prefix = relative(prefix)?;
        if cgroups.hierarchies.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "no cgroup file system is mounted",
            ));
        }
        Ok(cgroups)
    }

    pub(crate) fn is_v2(&self) -> bool {
        self.v2
    }

    /// Whether swap is accounted for, so that it can be limited. A kernel may be built or started
    /// without it.
    pub(crate) fn has_swap_accounting(&self) -> bool {
        let Some(memory) = self.controller("memory") else { return false };
        if !self.v2 {
            return memory.mount.join("memory.memsw.limit_in_bytes").exists();
        }
        // The root of version 2 has no limits, its children do: one with a limit for memory shows
        // whether there is one for swap.
        let mut children = fs::read_dir(&memory.mount).into_iter().flatten().flatten();
        children
            .find(|child| child.path().join("memory.max").exists())
            .is_none_or(|child| child.path().join("memory.swap.max").exists())
    }

    fn controller(&self, name: &str) -> Option<&Hierarchy> {
        self.hierarchies.iter().find(|h| h.controllers.contains(name))
    }

    /// The path of a pod's cgroup, below the root of each hierarchy.
    pub(crate) fn pod(&self, parent: &str) -> io::Result<PathBuf> {
        let parent = relative(parent)?;
        if parent.as_os_str().is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a pod needs a cgroup of its own",
            ));
        }
        Ok(self.prefix.join(parent))
    }

    /// The same, as libcontainer wants it.
    pub(crate) fn absolute(path: &Path) -> PathBuf {
        Path::new("/").join(path)
    }

    /// Makes a cgroup in all hierarchies.
    pub(crate) fn create(&self, path: &Path) -> io::Result<()> {
        for hierarchy in &self.hierarchies {
            let mut at = hierarchy.mount.clone();
            for component in path.components() {
                if self.v2 {
                    enable_controllers(&at);
                }
                at.push(component);
                match fs::create_dir(&at) {
                    Ok(()) => {}
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(e) => return Err(named(&at, &e)),
                }
                if hierarchy.controllers.contains("cpuset") && !self.v2 {
                    inherit_cpuset(&at)?;
                }
            }
        }
        Ok(())
    }

    /// Makes a pod's cgroup one that containers can be limited in.
    pub(crate) fn create_pod(&self, path: &Path) -> io::Result<()> {
        self.create(path)?;
        if self.v2 {
            for hierarchy in &self.hierarchies {
                enable_controllers(&hierarchy.mount.join(path));
            }
        }
        Ok(())
    }

    /// With version 1, each hierarchy's folder name and the cgroup's folder in it.
    pub(crate) fn v1_folders(&self, path: &Path) -> Vec<(String, PathBuf)> {
        if self.v2 {
            return Vec::new();
        }
        self.hierarchies
            .iter()
            .filter(|h| !h.controllers.is_empty())
            .map(|h| (h.folder.clone(), h.mount.join(path)))
            .collect()
    }

    /// Makes the shims' cgroup; the files that take a process into it.
    pub(crate) fn shim_entrances(&self) -> io::Result<Vec<PathBuf>> {
        let path = self.prefix.join(SHIMS);
        self.create(&path)?;
        Ok(self.hierarchies.iter().map(|h| h.mount.join(&path).join("cgroup.procs")).collect())
    }

    /// The files that take a process into this cgroup, in all hierarchies that have it.
    pub(crate) fn entrances(&self, path: &Path) -> Vec<PathBuf> {
        let path = path.strip_prefix("/").unwrap_or(path);
        self.hierarchies
            .iter()
            .map(|h| h.mount.join(path).join("cgroup.procs"))
            .filter(|p| p.exists())
            .collect()
    }

    /// The file with the count of out-of-memory kills in this cgroup.
    pub(crate) fn oom_file(&self, path: &Path) -> Option<PathBuf> {
        let name = if self.v2 { "memory.events" } else { "memory.oom_control" };
        self.controller("memory").map(|h| h.mount.join(path).join(name))
    }

    /// All processes in this cgroup and below.
    pub(crate) fn processes(&self, path: &Path) -> BTreeSet<i32> {
        let mut found = BTreeSet::new();
        for hierarchy in self.hierarchies.iter().filter(|h| !h.controllers.is_empty()) {
            walk(&hierarchy.mount.join(path), &mut |dir| {
                let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
                found.extend(text.lines().filter_map(|l| l.trim().parse::<i32>().ok()));
            });
        }
        found.remove(&0);
        found
    }

    /// Kills all processes in this cgroup and below, and waits until they are gone. Returns how many
    /// there were.
    pub(crate) fn kill(&self, path: &Path) -> io::Result<usize> {
        let deadline = Instant::now() + KILL_DEADLINE;
        let mut seen = BTreeSet::new();
        let mut pause = Duration::from_millis(1);
        loop {
            let processes = self.processes(path);
            if processes.is_empty() {
                return Ok(seen.len());
            }
            if self.v2 {
                for hierarchy in &self.hierarchies {
                    // Kernels before 5.14 don't have it; the signals below do the same.
                    let _ = fs::write(hierarchy.mount.join(path).join("cgroup.kill"), "1");
                }
            }
            for pid in &processes {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(*pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
            seen.extend(processes);
            if Instant::now() > deadline {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("processes in the cgroup {} don't end", path.display()),
                ));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// Removes this cgroup and all below, killing what is in it. Returns how many folders went.
    pub(crate) fn remove(&self, path: &Path) -> io::Result<usize> {
        if path.as_os_str().is_empty() {
            return Ok(0);
        }
        self.kill(path)?;
        let mut removed = 0;
        for hierarchy in &self.hierarchies {
            let mut dirs = Vec::new();
            walk(&hierarchy.mount.join(path), &mut |dir| dirs.push(dir.to_owned()));
            // The deepest first.
            for dir in dirs.into_iter().rev() {
                removed += usize::from(remove_dir(&dir)?);
            }
        }
        Ok(removed)
    }

    /// Removes what the whole runtime made. Returns how many folders went.
    pub(crate) fn remove_all(&self) -> io::Result<usize> {
        let mut removed = self.remove(&self.prefix.join(SHIMS))?;
        if self.prefix.as_os_str().is_empty() {
            // Without a prefix `kubepods` may be shared with others: only empty folders go.
            for hierarchy in &self.hierarchies {
                let mut dirs = Vec::new();
                walk(&hierarchy.mount.join("kubepods"), &mut |dir| dirs.push(dir.to_owned()));
                removed += dirs.iter().rev().filter(|d| fs::remove_dir(d).is_ok()).count();
            }
        } else {
            removed += self.remove(&self.prefix)?;
        }
        Ok(removed)
    }
}

/// A path from outside as one below a root: without a leading `/`, and without `..`.
fn relative(path: &str) -> io::Result<PathBuf> {
    let mut clean = PathBuf::new();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("cgroup {path:?}: \"..\" is not allowed"),
                ));
            }
        }
    }
    Ok(clean)
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Calls `visit` for a folder and all below it, parents first.
fn walk(dir: &Path, visit: &mut dyn FnMut(&Path)) {
    if !dir.is_dir() {
        return;
    }
    visit(dir);
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(&entry.path(), visit);
        }
    }
}

/// Removes an empty cgroup; the kernel may need a moment after its last process went.
fn remove_dir(dir: &Path) -> io::Result<bool> {
    let deadline = Instant::now() + KILL_DEADLINE;
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(e) => return Err(named(dir, &e)),
        }
    }
}

/// Lets the children of a version 2 cgroup have all the controllers that it has. One that can't be
/// handed on is found missing when a limit needs it.
fn enable_controllers(dir: &Path) {
    let available = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    let enabled = fs::read_to_string(dir.join("cgroup.subtree_control")).unwrap_or_default();
    let enabled: BTreeSet<_> = enabled.split_whitespace().collect();
    for controller in available.split_whitespace().filter(|c| !enabled.contains(c)) {
        let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// A new cpuset of version 1 is empty and takes no process until it has CPUs and memory nodes.
fn inherit_cpuset(dir: &Path) -> io::Result<()> {
    let Some(parent) = dir.parent() else { return Ok(()) };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = fs::read_to_string(dir.join(file)).map_err(|e| named(dir, &e))?;
        if own.trim().is_empty() {
            let inherited = fs::read_to_string(parent.join(file)).map_err(|e| named(parent, &e))?;
            fs::write(dir.join(file), inherited.trim()).map_err(|e| named(dir, &e))?;
        }
    }
    Ok(())
}

/// Which hierarchies there are, from `/proc/self/mountinfo`. A version 2 tree counts as *the*
/// version only if nothing of version 1 has controllers; else it is one more tree to keep processes
/// in.
fn parse(mountinfo: &str) -> Cgroups {
    const CONTROLLERS: [&str; 13] = [
        "cpu",
        "cpuacct",
        "cpuset",
        "memory",
        "devices",
        "freezer",
        "net_cls",
        "net_prio",
        "blkio",
        "perf_event",
        "hugetlb",
        "pids",
        "rdma",
    ];
    let mut hierarchies: Vec<Hierarchy> = Vec::new();
    let mut unified = None;
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let (Some(mount), Some(kind)) = (left.split(' ').nth(4), right.split(' ').next()) else {
            continue;
        };
        let mount = PathBuf::from(mount.replace("\\040", " "));
        let folder =
            mount.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        match kind {
            "cgroup" => {
                let options = right.split(' ').nth(2).unwrap_or_default();
                let controllers = options
                    .split(',')
                    .filter(|o| CONTROLLERS.contains(o))
                    .map(str::to_owned)
                    .collect();
                let hierarchy = Hierarchy { folder, mount, controllers };
                // The same tree may be mounted more than once.
                if hierarchy.controllers.is_empty()
                    || !hierarchies.iter().any(|h| h.controllers == hierarchy.controllers)
                {
                    hierarchies.push(hierarchy);
                }
            }
            "cgroup2" if unified.is_none() => {
                unified = Some(Hierarchy { folder, mount, controllers: BTreeSet::new() });
            }
            _ => {}
        }
    }
    let v2 = hierarchies.iter().all(|h| h.controllers.is_empty());
    if let Some(mut tree) = unified {
        if v2 {
            let text =
                fs::read_to_string(tree.mount.join("cgroup.controllers")).unwrap_or_default();
            tree.controllers = text.split_whitespace().map(str::to_owned).collect();
            hierarchies.clear();
        }
        hierarchies.push(tree);
    }
    Cgroups { prefix: PathBuf::new(), v2, hierarchies }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_in_mountinfo() {
        let separate = "\
30 29 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
32 30 0:28 / /sys/fs/cgroup/cpuacct rw - cgroup cgroup rw,cpuacct
33 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
34 30 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
35 30 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
36 30 0:29 / /mnt/again rw - cgroup cgroup rw,memory
";
        let found = parse(separate);
        assert!(!found.v2);
        let folders: Vec<_> = found.hierarchies.iter().map(|h| h.folder.as_str()).collect();
        assert_eq!(folders, ["cpu", "cpuacct", "memory", "systemd", "unified"]);
        assert_eq!(
            found.controller("memory").map(|h| h.mount.as_path()),
            Some(Path::new("/sys/fs/cgroup/memory"))
        );
        assert_eq!(found.v1_folders(Path::new("a")).len(), 3);

        let unified = parse("30 29 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n");
        assert!(unified.v2);
        assert_eq!(unified.hierarchies.len(), 1);
        assert!(parse("").hierarchies.is_empty());
    }

    #[test]
    fn paths_from_outside_stay_below_the_prefix() {
        let cgroups = Cgroups { prefix: "p".into(), v2: true, hierarchies: Vec::new() };
        assert_eq!(cgroups.pod("/kubepods/podx").unwrap(), Path::new("p/kubepods/podx"));
        assert!(cgroups.pod("../x").is_err());
        assert!(cgroups.pod("/").is_err());
    }
}
