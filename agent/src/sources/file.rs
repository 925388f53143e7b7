//! The folder of static pods.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use keelson_api::{
    events::{EventRecorder, EventType},
    object::{ObjectKey, reference_by_key},
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Change, folder_watch::FolderWatch, kept::Kept, static_pod};

/// The most files that a folder of manifests may hold.
const MAX_FILES: usize = 1_000;
/// How long to wait for more to change before the folder is read, so that a copy of many files is
/// read once.
const SETTLE: Duration = Duration::from_millis(20);

/// What the folder's reader needs.
pub(crate) struct FileSource {
    /// The folder, or one manifest.
    pub(crate) path: PathBuf,
    /// Where the last good text of each manifest is kept over restarts.
    pub(crate) kept: Option<PathBuf>,
    /// The node's name.
    pub(crate) node: String,
    /// The largest file, in bytes.
    pub(crate) max_bytes: u64,
    /// How often to read although nothing was noticed.
    pub(crate) period: Duration,
    /// For what is wrong with a manifest.
    pub(crate) events: EventRecorder,
    /// Where what was read goes.
    pub(crate) changes: mpsc::Sender<Change>,
    /// The end.
    pub(crate) shutdown: CancellationToken,
}

/// What was read from a folder.
#[derive(Debug, Default)]
struct Reading {
    pods: Vec<Pod>,
    /// What is wrong, by file.
    refused: BTreeMap<PathBuf, String>,
}

/// Namespace and name.
type PodName = (Option<String>, Option<String>);

/// What was known after the last reading.
#[derive(Debug, Default)]
struct Known {
    /// What each file held when it was last good.
    pods: BTreeMap<PathBuf, Vec<Pod>>,
    /// Which file each pod is from: the one that came first keeps it.
    owners: BTreeMap<PodName, PathBuf>,
    kept: Kept,
    /// Something was read by this process.
    begun: bool,
}

impl FileSource {
    /// Reads the folder whenever it changes, until the end.
    pub(crate) async fn run(self) {
        let kept = || Known { kept: Kept::new(self.kept.clone()), ..Known::default() };
        let mut known = kept();
        let mut told: Option<Vec<Option<String>>> = None;
        let mut complaints: BTreeMap<PathBuf, String> = BTreeMap::new();
        let mut watch = None;
        loop {
            if watch.is_none() {
                watch = FolderWatch::new(&self.path).ok();
            }
            let (path, node, max_bytes) = (self.path.clone(), self.node.clone(), self.max_bytes);
            let read = tokio::task::spawn_blocking(move || {
                let reading = read_all(&path, &node, max_bytes, &mut known);
                (reading, known)
            });
            let reading = match read.await {
                Ok((reading, returned)) => {
                    known = returned;
                    reading
                }
                Err(error) => {
                    tracing::error!(%error, "folder of static pods not read");
                    known = kept();
                    Err(io::Error::other(error))
                }
            };
            match reading {
                Ok(reading) => {
                    self.complain(&reading.refused, &mut complaints);
                    let uids: Vec<_> =
                        reading.pods.iter().map(|pod| pod.metadata.uid.clone()).collect();
                    if told.as_ref() != Some(&uids) {
                        let pods = reading.pods.into_iter().map(Arc::new).collect();
                        if self.changes.send(Change::Static(pods)).await.is_err() {
                            return;
                        }
                        told = Some(uids);
                    }
                }
                Err(error) => {
                    let message = format!("reading the folder of static pods: {error}");
                    let refused = BTreeMap::from([(self.path.clone(), message)]);
                    self.complain(&refused, &mut complaints);
                }
            }
            if !self.wait(&mut watch).await {
                return;
            }
        }
    }

    /// Waits for a change or the next period; `false` at the end.
    async fn wait(&self, watch: &mut Option<FolderWatch>) -> bool {
        let changed = async {
            match watch {
                Some(watch) => watch.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.shutdown.cancelled() => return false,
            () = tokio::time::sleep(self.period) => return true,
            changed = changed => {
                if !matches!(changed, Ok(true)) {
                    // the folder went away: it is watched again when it is back
                    *watch = None;
                }
            }
        }
        tokio::select! {
            () = self.shutdown.cancelled() => false,
            () = tokio::time::sleep(SETTLE) => true,
        }
    }

    /// Says once what is wrong with each file, in the log and on the node.
    fn complain(&self, refused: &BTreeMap<PathBuf, String>, told: &mut BTreeMap<PathBuf, String>) {
        let key = ObjectKey::new("", &self.node);
        let node = reference_by_key::<Node>(&key, Some(self.node.clone()));
        for (path, message) in refused {
            if told.get(path) != Some(message) {
                tracing::error!(path = %path.display(), message, "manifest refused");
                let message = format!("manifest {} refused: {message}", path.display());
                self.events.event(&node, EventType::Warning, "FailedValidation", message);
            }
        }
        for path in told.keys().filter(|path| !refused.contains_key(*path)) {
            tracing::info!(path = %path.display(), "manifest is good again or gone");
        }
        *told = refused.clone();
    }
}

/// Reads all manifests. A file that is broken keeps its last good pods running: a slip in an editor
/// must not stop what runs. Blocks on the file system.
fn read_all(path: &Path, node: &str, max_bytes: u64, known: &mut Known) -> io::Result<Reading> {
    let mut reading = Reading::default();
    let now = Timestamp::now();
    let limit = usize::try_from(max_bytes).unwrap_or(usize::MAX);
    let parse = |file: &Path, text: &[u8]| {
        static_pod::parse(text, limit, file, node, now).map_err(|error| error.to_string())
    };
    let files = list(path, &mut reading.refused)?;
    if !known.begun {
        // a restart: what was good before is known from the copies
        known.begun = true;
        for file in &files {
            let Some(pods) = known.kept.read(file).and_then(|text| parse(file, &text).ok()) else {
                continue;
            };
            for pod in &pods {
                known.owners.entry(name_of(pod)).or_insert_with(|| file.clone());
            }
            known.pods.insert(file.clone(), pods);
        }
    }
    let mut read = BTreeMap::new();
    for file in &files {
        let good =
            read_file(file, max_bytes).and_then(|text| parse(file, &text).map(|pods| (text, pods)));
        read.insert(file, good);
    }
    // a pod that two files hold stays with the one that had it before
    let holds = |file: &PathBuf, name: &PodName| match read.get(file) {
        Some(Ok((_, pods))) => pods.iter().any(|pod| name_of(pod) == *name),
        Some(Err(_)) => {
            known.pods.get(file).is_some_and(|pods| pods.iter().any(|pod| name_of(pod) == *name))
        }
        None => false,
    };
    let mut owners: BTreeMap<PodName, PathBuf> = known
        .owners
        .iter()
        .filter(|(name, file)| holds(file, name))
        .map(|(name, file)| (name.clone(), file.clone()))
        .collect();
    let mut good: BTreeMap<PathBuf, Vec<Pod>> = BTreeMap::new();
    for (file, result) in &read {
        let checked = match result {
            Ok((text, pods)) => claim(file, pods, &mut owners).map(|()| (text, pods)),
            Err(message) => Err(message.clone()),
        };
        match checked {
            Ok((text, pods)) => {
                if let Err(error) = known.kept.write(file, text) {
                    tracing::warn!(path = %file.display(), %error, "no copy of a manifest kept");
                }
                good.insert((*file).clone(), pods.clone());
            }
            Err(message) => {
                reading.refused.insert((*file).clone(), message);
            }
        }
    }
    // what is refused keeps what it had, as far as nobody else has that now
    for file in reading.refused.keys() {
        let Some(pods) = known.pods.get(file) else { continue };
        let left: Vec<Pod> = pods
            .iter()
            .filter(|pod| owners.entry(name_of(pod)).or_insert_with(|| file.clone()) == file)
            .cloned()
            .collect();
        good.insert(file.clone(), left);
    }
    if let Err(error) = known.kept.retain(files.iter()) {
        tracing::warn!(%error, "copies of manifests that are gone not removed");
    }
    reading.pods = good.values().flatten().cloned().collect();
    known.pods = good;
    known.owners = owners;
    Ok(reading)
}

fn name_of(pod: &Pod) -> PodName {
    (pod.metadata.namespace.clone(), pod.metadata.name.clone())
}

/// Takes the names of a file's pods for it, all or none.
fn claim(file: &Path, pods: &[Pod], owners: &mut BTreeMap<PodName, PathBuf>) -> Result<(), String> {
    let mut own = BTreeSet::new();
    for pod in pods {
        let name = name_of(pod);
        let taken = owners.get(&name).is_some_and(|owner| owner != file);
        if taken || !own.insert(name) {
            let place = if taken { "in another manifest already" } else { "in it twice" };
            return Err(format!(
                "pod {:?} in namespace {:?} is {place}: give it another name or remove one of them",
                pod.metadata.name.as_deref().unwrap_or_default(),
                pod.metadata.namespace.as_deref().unwrap_or_default()
            ));
        }
    }
    for name in own {
        owners.insert(name, file.to_owned());
    }
    Ok(())
}

/// The manifests in a folder, sorted; or the path itself if it is a file. Names that begin with a
/// dot are left out, and so are subfolders, as documented.
fn list(path: &Path, refused: &mut BTreeMap<PathBuf, String>) -> io::Result<Vec<PathBuf>> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        // a folder that is not there holds no pods; it may come later
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    if metadata.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let file = entry.path();
        // follows links; a loop of links is an error here
        match fs::metadata(&file) {
            Ok(metadata) if metadata.is_file() => files.push(file),
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => drop(refused.insert(file, "not a plain file".to_owned())),
            // removed since it was listed
            Err(error)
                if error.kind() == io::ErrorKind::NotFound && !entry.file_type()?.is_symlink() => {}
            Err(error) => drop(refused.insert(file, error.to_string())),
        }
    }
    files.sort();
    if files.len() > MAX_FILES {
        refused.insert(
            path.to_owned(),
            format!("holds {} manifests, only the first {MAX_FILES} are taken", files.len()),
        );
        files.truncate(MAX_FILES);
    }
    Ok(files)
}

fn read_file(path: &Path, max_bytes: u64) -> Result<Vec<u8>, String> {
    // not blocking: what was a file may have become a pipe
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| error.to_string())?;
    let length = file.metadata().map_err(|error| error.to_string())?.len();
    let too_large = |length: u64| {
        format!("{length} bytes are more than the {max_bytes} that a manifest may have")
    };
    if length > max_bytes {
        return Err(too_large(length));
    }
    let mut text = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > max_bytes {
        return Err(too_large(text.len() as u64));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(name: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  containers: [{{name: a, image: 'app:1'}}]\n"
        )
    }

    fn names(pods: &[Arc<Pod>]) -> Vec<String> {
        pods.iter().map(|pod| pod.metadata.name.clone().unwrap()).collect()
    }

    #[tokio::test]
    async fn changes_are_noticed_and_broken_files_harm_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let (changes, mut heard) = mpsc::channel(8);
        let shutdown = CancellationToken::new();
        let source = FileSource {
            path: folder.path().to_owned(),
            kept: None,
            node: "n".to_owned(),
            max_bytes: 4096,
            period: Duration::from_secs(3600),
            events: EventRecorder::discard(),
            changes,
            shutdown: shutdown.clone(),
        };
        let task = tokio::spawn(source.run());
        let mut next = async || {
            let change = tokio::time::timeout(Duration::from_secs(10), heard.recv()).await;
            match change.unwrap().unwrap() {
                Change::Static(pods) => names(&pods),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(next().await, [""; 0]);
        fs::write(folder.path().join("a.yaml"), manifest("a")).unwrap();
        assert_eq!(next().await, ["a-n"]);
        fs::write(folder.path().join("bad.yaml"), "a: [").unwrap();
        fs::write(folder.path().join("big.yaml"), "#".repeat(5000)).unwrap();
        std::os::unix::fs::symlink("loop.yaml", folder.path().join("loop.yaml")).unwrap();
        fs::write(folder.path().join("twin.yaml"), manifest("a")).unwrap();
        fs::write(folder.path().join("b.yaml"), manifest("b")).unwrap();
        assert_eq!(next().await, ["a-n", "b-n"]);
        // what runs goes on while its file is broken
        fs::write(folder.path().join("b.yaml"), "a: [").unwrap();
        fs::remove_file(folder.path().join("twin.yaml")).unwrap();
        fs::rename(folder.path().join("a.yaml"), folder.path().join(".a.yaml")).unwrap();
        assert_eq!(next().await, ["b-n"]);
        fs::remove_file(folder.path().join("b.yaml")).unwrap();
        assert_eq!(next().await, [""; 0]);
        shutdown.cancel();
        task.await.unwrap();
    }

    fn read(folder: &Path, known: &mut Known) -> Reading {
        read_all(folder, "n", 4096, known).unwrap()
    }

    fn uids(reading: &Reading) -> Vec<String> {
        reading.pods.iter().map(|pod| pod.metadata.uid.clone().unwrap()).collect()
    }

    #[test]
    fn the_pod_that_was_there_first_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let mut known = Known::default();
        fs::write(path("m.yaml"), manifest("a")).unwrap();
        let first = uids(&read(folder.path(), &mut known));
        // sorted before the one that runs, but later
        fs::write(path("a.yaml"), manifest("a").replace("app:1", "app:2")).unwrap();
        let reading = read(folder.path(), &mut known);
        assert_eq!(uids(&reading), first);
        assert!(reading.refused[&path("a.yaml")].contains("another manifest"));
        fs::remove_file(path("m.yaml")).unwrap();
        let reading = read(folder.path(), &mut known);
        assert!(reading.refused.is_empty(), "{:?}", reading.refused);
        assert_ne!(uids(&reading), first, "the newcomer takes over");
    }

    #[test]
    fn a_restart_keeps_what_a_broken_or_doubled_file_had() {
        let folder = tempfile::tempdir().unwrap();
        let kept = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let fresh = || Known { kept: Kept::new(Some(kept.path().join("k"))), ..Known::default() };
        fs::write(path("b.yaml"), manifest("b")).unwrap();
        fs::write(path("c.yaml"), manifest("c")).unwrap();
        let before = uids(&read(folder.path(), &mut fresh()));
        fs::write(path("a.yaml"), manifest("b").replace("app:1", "app:2")).unwrap();
        fs::write(path("c.yaml"), "a: [").unwrap();
        let reading = read(folder.path(), &mut fresh());
        assert_eq!(uids(&reading), before);
        assert_eq!(reading.refused.len(), 2, "{:?}", reading.refused);
        for name in ["a.yaml", "b.yaml", "c.yaml"] {
            fs::remove_file(path(name)).unwrap();
        }
        assert!(uids(&read(folder.path(), &mut fresh())).is_empty());
        assert_eq!(fs::read_dir(kept.path().join("k")).unwrap().count(), 0);
    }

    #[test]
    fn each_refusal_is_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.yaml"), manifest("a")).unwrap();
        fs::write(folder.path().join("b.yaml"), manifest("a")).unwrap();
        fs::write(folder.path().join("big.yaml"), "#".repeat(5000)).unwrap();
        std::os::unix::fs::symlink("loop.yaml", folder.path().join("loop.yaml")).unwrap();
        let bomb: String = (0..40)
            .map(|level| {
                let inner = if level == 0 { "x".to_owned() } else { format!("*a{}", level - 1) };
                format!("k{level}: &a{level} [{}]\n", vec![inner; 9].join(","))
            })
            .collect();
        fs::write(folder.path().join("bomb.yaml"), &bomb).unwrap();
        let reading = read_all(folder.path(), "n", 4096, &mut Known::default()).unwrap();
        assert_eq!(reading.pods.len(), 1);
        let message = |name: &str| reading.refused[&folder.path().join(name)].clone();
        assert!(message("b.yaml").contains("another manifest"), "{}", message("b.yaml"));
        assert!(message("big.yaml").contains("5000 bytes"), "{}", message("big.yaml"));
        assert!(!message("loop.yaml").is_empty());
        assert!(!message("bomb.yaml").is_empty());
    }
}
