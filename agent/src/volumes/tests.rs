use std::{collections::BTreeSet, os::unix::fs::symlink, process::Command, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Service;
use tokio::sync::watch;

use super::*;
use crate::environment::{Data, DataKind, DataName, ObjectError, Token, TokenWish, Watched};

/// Objects that a test changes at will.
#[derive(Default)]
struct Objects {
    known: Mutex<HashMap<DataName, watch::Sender<Watched>>>,
    issued: Mutex<u32>,
    /// How long tokens are good for; nothing: the API server is away.
    token_life: Mutex<Option<SignedDuration>>,
}

impl Objects {
    fn sender(&self, object: &DataName) -> watch::Sender<Watched> {
        let mut known = self.known.lock().unwrap();
        let missing = Watched::Missing(ObjectError::NotFound(object.clone()));
        known.entry(object.clone()).or_insert_with(|| watch::channel(missing).0).clone()
    }

    fn set(&self, kind: DataKind, name: &str, values: &[(&str, &str)]) {
        let values = values.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec()));
        let data = Data { values: values.collect(), ..Data::default() };
        self.sender(&named(kind, name)).send_replace(Watched::Present(Arc::new(data)));
    }

    fn lose(&self, kind: DataKind, name: &str) {
        let reason = ObjectError::Unreachable("away".into());
        self.sender(&named(kind, name)).send_replace(Watched::Missing(reason));
    }

    fn listeners(&self, kind: DataKind, name: &str) -> usize {
        self.sender(&named(kind, name)).receiver_count()
    }
}

#[async_trait]
impl ObjectSource for Objects {
    async fn data(&self, object: &DataName) -> Result<Arc<Data>, ObjectError> {
        match &*self.sender(object).borrow() {
            Watched::Present(data) => Ok(Arc::clone(data)),
            _ => Err(ObjectError::NotFound(object.clone())),
        }
    }

    fn watch(&self, object: &DataName) -> watch::Receiver<Watched> {
        self.sender(object).subscribe()
    }

    async fn services(&self) -> Result<Vec<Arc<Service>>, ObjectError> {
        Ok(Vec::new())
    }

    async fn token(&self, wish: &TokenWish) -> Result<Token, ObjectError> {
        assert_eq!((wish.pod.0.as_str(), wish.service_account.as_str()), ("web", "sa"));
        let life = *self.token_life.lock().unwrap();
        let life = life.ok_or_else(|| ObjectError::Unreachable("away".into()))?;
        let mut issued = self.issued.lock().unwrap();
        *issued += 1;
        let expires = Timestamp::now().checked_add(life).unwrap();
        Ok(Token { token: format!("token-{issued}"), expires })
    }
}

fn named(kind: DataKind, name: &str) -> DataName {
    DataName { kind, namespace: "ns".into(), name: name.into() }
}

/// Runs a test once more in a process that has a mount namespace of its own.
fn in_own_mounts(name: &str, test: impl Future<Output = ()>) {
    const INSIDE: &str = "KEELSON_TEST_OWN_MOUNTS";
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        return runtime.block_on(test);
    }
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--"])
        .arg(std::env::current_exe().unwrap())
        .args([&format!("volumes::tests::{name}"), "--exact", "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare (Debian package util-linux) and root are needed");
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{errors}");
}

struct Node {
    folder: tempfile::TempDir,
    objects: Arc<Objects>,
    volumes: HostVolumes,
}

impl Node {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let objects = Arc::new(Objects::default());
        *objects.token_life.lock().unwrap() = Some(SignedDuration::from_hours(1));
        let volumes = Self::volumes(folder.path(), &objects);
        Self { folder, objects, volumes }
    }

    fn volumes(folder: &Path, objects: &Arc<Objects>) -> HostVolumes {
        let objects: Arc<dyn ObjectSource> = Arc::clone(objects) as _;
        let nothing: AllocatableNow = Arc::new(BTreeMap::new);
        HostVolumes::new(folder, objects, nothing, &CancellationToken::new()).unwrap()
    }

    /// As if the agent had been killed and started.
    fn restart(&mut self) {
        self.volumes = Self::volumes(self.folder.path(), &self.objects);
    }
}

fn pod(volumes: &serde_json::Value, context: &serde_json::Value) -> Pod {
    serde_json::from_value(serde_json::json!({
        "metadata": {"name": "web", "namespace": "ns", "uid": "uid-1", "labels": {"a": "1"}},
        "spec": {"volumes": volumes, "securityContext": context, "serviceAccountName": "sa",
            "containers": [{"name": "c"}]},
    }))
    .unwrap()
}

fn all_kinds() -> serde_json::Value {
    serde_json::json!([
        {"name": "disk", "emptyDir": {}},
        {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": "conf", "configMap": {"name": "conf"}},
        {"name": "keys", "secret": {"secretName": "keys", "defaultMode": 0o400}},
        {"name": "me", "downwardAPI": {"items": [
            {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        {"name": "access", "projected": {"sources": [
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
            {"configMap": {"name": "conf", "items": [{"key": "a", "path": "ca.crt"}]}}]}},
        {"name": "host", "hostPath": {"path": "/etc", "type": "Directory"}},
    ])
}

fn read(mounted: &MountedVolumes, volume: &str, file: &str) -> Option<String> {
    fs::read_to_string(mounted.paths[volume].join(file)).ok()
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "not within 10 s: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn volumes_live_and_go() {
    in_own_mounts("volumes_live_and_go", async {
        let mut node = Node::new();
        node.objects.set(DataKind::ConfigMap, "conf", &[("a", "1")]);
        node.objects.set(DataKind::Secret, "keys", &[("k", "secret")]);
        let pod = pod(&all_kinds(), &serde_json::json!({"fsGroup": 4242}));
        let mounted = node.volumes.mount(&pod).await.unwrap();
        let folder = node.folder.path().canonicalize().unwrap().join("pods/uid-1");
        assert_eq!(mounted.paths["conf"], folder.join("volumes/kubernetes.io~configmap/conf"));
        assert_eq!(mounted.paths["host"], Path::new("/etc"));
        for (volume, file, content) in [
            ("conf", "a", "1"),
            ("keys", "k", "secret"),
            ("me", "labels", "a=\"1\""),
            ("access", "token", "token-1"),
            ("access", "ca.crt", "1"),
        ] {
            assert_eq!(read(&mounted, volume, file).as_deref(), Some(content), "{volume}");
        }
        let in_memory: BTreeSet<PathBuf> =
            mounts::mounts_below(&folder).unwrap().into_iter().collect();
        let expected = ["memory", "keys", "me", "access"].map(|v| mounted.paths[v].clone());
        assert_eq!(in_memory, BTreeSet::from(expected));
        for volume in ["disk", "memory"] {
            let found = fs::metadata(&mounted.paths[volume]).unwrap();
            assert_eq!((found.gid(), found.mode() & 0o7777), (4242, 0o2777), "{volume}");
        }
        let key = fs::metadata(mounted.paths["keys"].join("k")).unwrap();
        assert_eq!((key.gid(), key.mode() & 0o777), (4242, 0o440));
        let too_much = vec![1u8; 2 << 20];
        assert!(fs::write(mounted.paths["memory"].join("big"), too_much).is_err());

        // The agent is killed and started: what is there stays, nothing is mounted twice.
        fs::write(mounted.paths["disk"].join("kept"), "kept").unwrap();
        node.restart();
        assert_eq!(node.volumes.mount(&pod).await.unwrap(), mounted);
        assert_eq!(read(&mounted, "disk", "kept").as_deref(), Some("kept"));
        assert_eq!(mounts::mounts_below(&folder).unwrap().len(), 4);

        // And killed again: what it never mounted itself is unmounted all the same, and what a
        // mount leads to is not touched.
        let precious = node.folder.path().join("precious");
        fs::create_dir(&precious).unwrap();
        fs::write(precious.join("file"), "x").unwrap();
        let planted = mounted.paths["disk"].join("planted");
        fs::create_dir(&planted).unwrap();
        mounts::bind(std::os::fd::AsFd::as_fd(&fs::File::open(&precious).unwrap()), &planted)
            .unwrap();
        symlink(&precious, mounted.paths["disk"].join("link")).unwrap();
        node.restart();
        assert_eq!(node.volumes.pods_on_disk().await, ["uid-1"]);
        node.volumes.unmount("uid-1").await.unwrap();
        node.volumes.unmount("uid-1").await.unwrap();
        assert!(!folder.exists() && precious.join("file").exists());
        assert!(node.volumes.pods_on_disk().await.is_empty());
        assert!(mounts::mounts_below(&folder).unwrap().is_empty());
    });
}

#[test]
fn files_follow_their_objects() {
    in_own_mounts("files_follow_their_objects", async {
        let mut node = Node::new();
        *node.objects.token_life.lock().unwrap() = Some(SignedDuration::from_millis(500));
        let mut pod = pod(&all_kinds(), &serde_json::json!({}));
        let said = node.volumes.mount(&pod).await.unwrap_err();
        assert_eq!(
            said.to_string(),
            "MountVolume.SetUp failed for volume \"conf\": configmap \"conf\" not found"
        );
        node.objects.set(DataKind::ConfigMap, "conf", &[("a", "1")]);
        node.objects.set(DataKind::Secret, "keys", &[("k", "1")]);
        let mounted = node.volumes.mount(&pod).await.unwrap();

        node.objects.set(DataKind::ConfigMap, "conf", &[("a", "2"), ("b", "3")]);
        until("the ConfigMap's change", || {
            read(&mounted, "conf", "b").as_deref() == Some("3")
                && read(&mounted, "access", "ca.crt").as_deref() == Some("2")
        })
        .await;
        until("the token's renewal", || {
            read(&mounted, "access", "token").is_some_and(|token| token != "token-1")
        })
        .await;
        pod.metadata.labels = Some(BTreeMap::from([("a".to_owned(), "2".to_owned())]));
        node.volumes.mount(&pod).await.unwrap();
        assert_eq!(read(&mounted, "me", "labels").as_deref(), Some("a=\"2\""));

        // The API server goes away, and the agent is restarted: the pod runs on with what it has.
        *node.objects.token_life.lock().unwrap() = None;
        node.objects.lose(DataKind::ConfigMap, "conf");
        node.objects.lose(DataKind::Secret, "keys");
        node.restart();
        node.volumes.mount(&pod).await.unwrap();
        assert_eq!(read(&mounted, "conf", "a").as_deref(), Some("2"));
        *node.objects.token_life.lock().unwrap() = Some(SignedDuration::from_hours(1));
        node.objects.set(DataKind::ConfigMap, "conf", &[("a", "back")]);
        until("the change after the outage", || {
            read(&mounted, "conf", "a").as_deref() == Some("back")
        })
        .await;

        node.volumes.unmount("uid-1").await.unwrap();
        until("nobody listens any more", || {
            node.objects.listeners(DataKind::ConfigMap, "conf") == 0
        })
        .await;
    });
}

#[test]
fn a_sub_path_is_mounted_by_what_it_is() {
    in_own_mounts("a_sub_path_is_mounted_by_what_it_is", async {
        let node = Node::new();
        node.objects.set(DataKind::ConfigMap, "conf", &[("a", "1")]);
        let volumes = serde_json::json!([
            {"name": "disk", "emptyDir": {}}, {"name": "conf", "configMap": {"name": "conf"}}]);
        let mounted = node.volumes.mount(&pod(&volumes, &serde_json::json!({}))).await.unwrap();
        let part = |volume: &'static str, index, sub_path| SubPathMount {
            pod_uid: "uid-1",
            container: "c",
            index,
            volume,
            volume_path: &mounted.paths[volume],
            sub_path,
        };
        let file = node.volumes.sub_path(&part("conf", 0, "a")).await.unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "1");
        // The same again is the same mount; after a change of the volume it is what is new.
        node.volumes.sub_path(&part("conf", 0, "a")).await.unwrap();
        node.objects.set(DataKind::ConfigMap, "conf", &[("a", "2")]);
        until("the change", || read(&mounted, "conf", "a").as_deref() == Some("2")).await;
        assert_eq!(fs::read_to_string(&file).unwrap(), "1");
        node.volumes.sub_path(&part("conf", 0, "a")).await.unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "2");

        let folder = node.volumes.sub_path(&part("disk", 1, "x/y")).await.unwrap();
        fs::write(folder.join("f"), "f").unwrap();
        assert_eq!(read(&mounted, "disk", "x/y/f").as_deref(), Some("f"));
        symlink("/etc", mounted.paths["disk"].join("etc")).unwrap();
        let said = node.volumes.sub_path(&part("disk", 2, "etc")).await.unwrap_err();
        assert!(said.to_string().contains("leaves the volume"), "{said}");
        node.volumes.unmount("uid-1").await.unwrap();
        assert!(node.volumes.pods_on_disk().await.is_empty());
    });
}

#[tokio::test]
async fn names_that_are_no_names_are_refused() {
    let node = Node::new();
    for uid in ["", "..", ".", "a/b", "../x"] {
        assert!(node.volumes.unmount(uid).await.is_err(), "{uid}");
    }
    node.volumes.unmount("never-seen").await.unwrap();
    let mut bad =
        pod(&serde_json::json!([{"name": "a/b", "emptyDir": {}}]), &serde_json::json!({}));
    assert!(node.volumes.mount(&bad).await.is_err());
    bad.metadata.uid = Some("../..".into());
    assert!(node.volumes.mount(&bad).await.is_err());
}
