use std::{
    io::Write,
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use oci_client::{
    Client, Reference,
    client::{ClientConfig, ClientProtocol, Config, ImageLayer},
    manifest::OciImageManifest,
    secrets::RegistryAuth as Credentials,
};
use oci_spec::image::ConfigBuilder;

use super::*;

const BUSYBOX: &str = "/bin/busybox";

/// Debian's registry on a free port of the loopback, with its files in a folder of its own.
struct TestRegistry {
    child: Child,
    host: String,
    files: tempfile::TempDir,
}

impl TestRegistry {
    async fn start(users: Option<&str>) -> Self {
        let files = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let host = format!("127.0.0.1:{port}");
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: {host}}}\n",
            files.path().join("data").display()
        );
        if let Some(users) = users {
            let path = files.path().join("users");
            fs::write(&path, users).unwrap();
            config += &format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", path.display());
        }
        let config_path = files.path().join("config.yml");
        fs::write(&config_path, config).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config_path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry must be installed (Debian package docker-registry)");
        let registry = Self { child, host, files };
        let deadline = Instant::now() + Duration::from_secs(20);
        while tokio::net::TcpStream::connect(&registry.host).await.is_err() {
            assert!(Instant::now() < deadline, "the registry did not start");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        registry
    }

    fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.host)
    }

    /// Pushes an image of one layer; returns the layer's digest.
    async fn push(
        &self,
        name: &str,
        tar: &[u8],
        compressed: Vec<u8>,
        auth: &Credentials,
    ) -> String {
        let config = ClientConfig { protocol: ClientProtocol::Http, ..ClientConfig::default() };
        let client = Client::try_from(config).unwrap();
        let reference: Reference = self.image(name).parse().unwrap();
        let layer = ImageLayer::oci_v1_gzip(compressed, None);
        let digest = layer.sha256_digest();
        let config = Config::oci_v1(config_of(&[hashing::digest(tar)]), None);
        let manifest = OciImageManifest::build(std::slice::from_ref(&layer), &config, None);
        client.push(&reference, &[layer], config, auth, Some(manifest)).await.unwrap();
        digest
    }

    fn blob_file(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap();
        let blobs = "data/docker/registry/v2/blobs/sha256";
        self.files.path().join(blobs).join(&hex[..2]).join(hex).join("data")
    }
}

impl Drop for TestRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn config_of(diff_ids: &[Digest]) -> Vec<u8> {
    let ids: Vec<&str> = diff_ids.iter().map(Digest::as_str).collect();
    serde_json::to_vec(&serde_json::json!({
        "architecture": oci_spec::image::Arch::default().to_string(),
        "os": "linux",
        "config": {"Cmd": ["/bin/busybox"], "User": "1000:1000", "Volumes": {"/data": {}}},
        "rootfs": {"type": "layers", "diff_ids": ids},
    }))
    .unwrap()
}

fn busybox_layer() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_path_with_name(BUSYBOX, "bin/busybox").unwrap();
    tar.into_inner().unwrap()
}

fn small_layer(name: &str) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(name.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, name.as_bytes()).unwrap();
    tar.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn store(root: &Path, insecure: &str) -> ImageStore {
    let options =
        ImageOptions { insecure_registries: vec![insecure.to_owned()], ..ImageOptions::default() };
    ImageStore::open(root.to_owned(), options).unwrap()
}

fn tar_of(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, *content).unwrap();
    }
    tar.into_inner().unwrap()
}

fn nobody_uses_it() -> BTreeSet<ImageId> {
    BTreeSet::new()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_goes_through_a_real_registry() {
    let registry = TestRegistry::start(None).await;
    let tar = busybox_layer();
    registry.push("team/busybox:1", &tar, gzip(&tar), &Credentials::Anonymous).await;
    let root = tempfile::tempdir().unwrap();
    let images = store(root.path(), &registry.host);
    let name = registry.image("team/busybox:1");
    assert_eq!(images.find(&name).await.unwrap(), None);

    let (first, second) = tokio::join!(images.pull(&name, &[]), images.pull(&name, &[]));
    let image = first.unwrap();
    assert_eq!(image, second.unwrap());
    assert_eq!(image.repo_tags, std::slice::from_ref(&name));
    assert_eq!((image.uid, image.username.as_deref()), (Some(1000), None));
    assert_eq!(image.volumes, [PathBuf::from("/data")]);
    let by_digest = &image.repo_digests[0];
    for asked in [name.as_str(), by_digest, image.id.as_str(), &image.id.as_str()[7..]] {
        assert_eq!(images.find(asked).await.unwrap().as_ref(), Some(&image), "{asked}");
    }
    assert_eq!(images.pull(by_digest, &[]).await.unwrap().id, image.id);

    let layers = images.layers(&image.id).await.unwrap();
    assert_eq!(fs::read(layers[0].join("bin/busybox")).unwrap(), fs::read(BUSYBOX).unwrap());
    let config = images.config(&image.id).await.unwrap();
    assert_eq!(config.config().as_ref().unwrap().cmd().as_deref().unwrap(), [BUSYBOX]);
    let info = images.fs_info().await.unwrap();
    assert!(info.used_bytes > 100_000 && info.inodes_used == 1, "{info:?}");

    // Another process with the same folder sees the same; removing takes the layers along.
    let again = store(root.path(), &registry.host);
    assert_eq!(again.list().await.unwrap(), std::slice::from_ref(&image));
    let in_use = BTreeSet::from([image.id.clone()]);
    assert!(matches!(again.remove(&name, &in_use).await, Err(RuntimeError::Invalid(_))));
    again.remove(&name, &nobody_uses_it()).await.unwrap();
    again.remove(&name, &nobody_uses_it()).await.unwrap();
    assert!(images.list().await.unwrap().is_empty() && !layers[0].exists());
    assert!(matches!(images.layers(&image.id).await, Err(RuntimeError::NotFound(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_platforms_this_ones_image_is_taken() {
    let registry = TestRegistry::start(None).await;
    let layer = small_layer("mine");
    registry.push("multi:mine", &layer, gzip(&layer), &Credentials::Anonymous).await;
    let config = ClientConfig { protocol: ClientProtocol::Http, ..ClientConfig::default() };
    let client = Client::try_from(config).unwrap();
    let single: Reference = registry.image("multi:mine").parse().unwrap();
    let accepted = ["application/vnd.oci.image.manifest.v1+json"];
    let (manifest, digest) =
        client.pull_manifest_raw(&single, &Credentials::Anonymous, &accepted).await.unwrap();
    let entry = |arch: &str| {
        serde_json::json!({"mediaType": accepted[0], "digest": digest, "size": manifest.len(),
            "platform": {"os": "linux", "architecture": arch}})
    };
    let root = tempfile::tempdir().unwrap();
    let images = store(root.path(), &registry.host);
    let mine = oci_spec::image::Arch::default().to_string();
    for (tag, arch) in [("all", mine.as_str()), ("other", "mips")] {
        let index = serde_json::from_value(serde_json::json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [entry("s390"), entry(arch)]}))
        .unwrap();
        let name: Reference = registry.image(&format!("multi:{tag}")).parse().unwrap();
        client.push_manifest_list(&name, &Credentials::Anonymous, index).await.unwrap();
    }
    let image = images.pull(&registry.image("multi:all"), &[]).await.unwrap();
    assert!(!image.repo_digests[0].ends_with(&digest), "the index's digest is the name's");
    assert!(images.layers(&image.id).await.unwrap()[0].join("mine").exists());
    let said = images.pull(&registry.image("multi:other"), &[]).await.unwrap_err().to_string();
    assert!(said.contains(&format!("not for linux/{mine}")), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_registry_gets_wrong_is_said() {
    let registry = TestRegistry::start(None).await;
    let root = tempfile::tempdir().unwrap();
    let images = store(root.path(), &registry.host);
    let reason = async |name: &str| match images.pull(name, &[]).await {
        Err(RuntimeError::ImagePull { reason, .. }) => reason,
        other => panic!("{name}: {other:?}"),
    };
    let host = registry.host.clone();
    let said = reason(&registry.image("none:1")).await;
    assert!(said.starts_with(&format!("not found in registry {host}")), "{said}");
    let said = reason("no-registry").await;
    assert!(said.contains("no default registry is configured"), "{said}");
    let said = reason("127.0.0.1:1/x").await;
    assert!(said.starts_with("registry 127.0.0.1:1 can't be reached: "), "{said}");
    assert!(matches!(
        images.pull("Not a name", &[]).await,
        Err(RuntimeError::InvalidImageName { .. })
    ));

    // A blob that changed on the registry's disk, at the same length.
    let tar = busybox_layer();
    let digest = registry.push("broken:1", &tar, gzip(&tar), &Credentials::Anonymous).await;
    let path = registry.blob_file(&digest);
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let said = reason(&registry.image("broken:1")).await;
    assert!(said.contains("digest mismatch"), "{said}");
    // And one that lost its end.
    fs::write(&path, &bytes[..middle]).unwrap();
    let said = reason(&registry.image("broken:1")).await;
    assert!(said.contains("size mismatch"), "{said}");

    // A configuration that names another layer than the one that comes.
    let other = small_layer("other");
    let comes = gzip(&small_layer("comes"));
    registry.push("lies:1", &other, comes, &Credentials::Anonymous).await;
    let said = reason(&registry.image("lies:1")).await;
    assert!(said.contains("digest mismatch"), "{said}");
    assert!(images.list().await.unwrap().is_empty());
    assert_eq!(images.fs_info().await.unwrap().inodes_used, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_wants_credentials_gets_the_right_ones() {
    // The password is "secret", in bcrypt, which is all that this registry takes.
    let users = "user:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
    let registry = TestRegistry::start(Some(users)).await;
    let root = tempfile::tempdir().unwrap();
    let images = store(root.path(), &registry.host);
    let name = registry.image("private:1");
    let wrong = RegistryAuth {
        username: "user".into(),
        password: "wrong".into(),
        ..RegistryAuth::default()
    };
    for auth in [&[][..], std::slice::from_ref(&wrong)] {
        match images.pull(&name, auth).await {
            Err(RuntimeError::ImagePull { reason, .. }) => {
                let expected = format!("registry {} denies access", registry.host);
                assert!(reason.starts_with(&expected), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    let tar = small_layer("private");
    let credentials = Credentials::Basic("user".into(), "secret".into());
    registry.push("private:1", &tar, gzip(&tar), &credentials).await;
    let right = RegistryAuth { password: "secret".into(), ..wrong.clone() };
    let image = images.pull(&name, &[wrong, right]).await.unwrap();
    assert_eq!(image.repo_tags, [name]);
}

#[tokio::test]
async fn a_docker_archive_is_imported() {
    let root = tempfile::tempdir().unwrap();
    let images = store(&root.path().join("store"), "");
    let (lower, upper) = (small_layer("lower"), small_layer("upper"));
    let ids = [hashing::digest(&lower), hashing::digest(&upper), hashing::digest(&lower)];
    let config = config_of(&ids);
    let manifest = br#"[{"Config":"c.json","RepoTags":["demo:1","reg.example/demo:2"],
        "Layers":["a/layer.tar","b/layer.tar","c/layer.tar"]}]"#;
    let mut tar = tar::Builder::new(tar_of(&[]));
    for (name, content) in [
        ("manifest.json", manifest.as_slice()),
        ("c.json", &config),
        ("a/layer.tar", &lower),
        ("b/layer.tar", &upper),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, name, content).unwrap();
    }
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    tar.append_link(&mut header, "c/layer.tar", "../a/layer.tar").unwrap();
    // The empty archive in front was only to have a writer.
    let bytes = tar.into_inner().unwrap();
    let bytes = bytes[tar_of(&[]).len()..].to_vec();
    for (file, bytes) in [("plain.tar", bytes.clone()), ("packed.tar.gz", gzip(&bytes))] {
        let path = root.path().join(file);
        fs::write(&path, bytes).unwrap();
        let imported = images.import(&path).await.unwrap();
        assert_eq!(imported.len(), 1);
        assert_eq!(imported[0].repo_tags, ["demo:1", "reg.example/demo:2"]);
        assert_eq!(imported[0].id.as_str(), hashing::digest(&config).as_str());
    }
    let image = images.find("demo:1").await.unwrap().unwrap();
    // The layer that comes twice is stacked once, where it comes last.
    let layers = images.layers(&image.id).await.unwrap();
    assert_eq!(layers.len(), 2);
    assert!(layers[0].join("upper").exists() && layers[1].join("lower").exists());
    assert_eq!(images.tag("demo:1", "other").await.unwrap().repo_tags.len(), 3);
    assert_eq!(images.find("other:latest").await.unwrap().unwrap().id, image.id);
    assert!(matches!(images.tag("none", "x").await, Err(RuntimeError::NotFound(_))));
}

/// The members of an image layout with one image for this platform and one for another.
fn layout() -> Vec<(String, Vec<u8>)> {
    let blob = |bytes: &[u8]| format!("blobs/sha256/{}", hashing::digest(bytes).hex());
    let descriptor = |kind: &str, bytes: &[u8]| {
        serde_json::json!({"mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": hashing::digest(bytes).as_str(), "size": bytes.len()})
    };
    let tar = small_layer("file");
    let layer = zstd::encode_all(tar.as_slice(), 1).unwrap();
    let config = config_of(&[hashing::digest(&tar)]);
    let manifest = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2,
        "config": descriptor("config.v1+json", &config),
        "layers": [descriptor("layer.v1.tar+zstd", &layer)],
    }))
    .unwrap();
    let platform = |arch: &str| serde_json::json!({"os": "linux", "architecture": arch});
    let mut mine = descriptor("manifest.v1+json", &manifest);
    mine["platform"] = platform(&oci_spec::image::Arch::default().to_string());
    let mut other = descriptor("manifest.v1+json", b"not there");
    other["platform"] = platform("mips");
    let index =
        serde_json::to_vec(&serde_json::json!({"schemaVersion": 2, "manifests": [other, mine]}))
            .unwrap();
    let mut top = descriptor("index.v1+json", &index);
    top["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "v1"});
    let top =
        serde_json::to_vec(&serde_json::json!({"schemaVersion": 2, "manifests": [top]})).unwrap();
    vec![
        ("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ("index.json".into(), top),
        (blob(&index), index),
        (blob(&manifest), manifest),
        (blob(&config), config),
        (blob(&layer), layer),
    ]
}

#[tokio::test]
async fn an_image_layout_is_imported_from_a_folder_or_an_archive() {
    let root = tempfile::tempdir().unwrap();
    let images = store(&root.path().join("store"), "");
    let members = layout();
    let folder = root.path().join("web");
    for (name, content) in &members {
        fs::create_dir_all(folder.join(name).parent().unwrap()).unwrap();
        fs::write(folder.join(name), content).unwrap();
    }
    let members: Vec<_> = members.iter().map(|(n, c)| (n.as_str(), c.as_slice())).collect();
    let archive = root.path().join("api.tar");
    fs::write(&archive, tar_of(&members)).unwrap();
    let first = images.import(&folder).await.unwrap();
    let second = images.import(&archive).await.unwrap();
    assert_eq!(first[0].repo_tags, ["web:v1"]);
    assert_eq!(second[0].repo_tags, ["api:v1", "web:v1"]);
    assert!(second[0].repo_digests[0].starts_with("api@sha256:"));

    // A blob that is not what its name says.
    let layer = members.last().unwrap().0;
    fs::write(folder.join(layer), small_layer("changed")).unwrap();
    images.remove("web:v1", &nobody_uses_it()).await.unwrap();
    let said = images.import(&folder).await.unwrap_err().to_string();
    assert!(said.contains("digest mismatch"), "{said}");
    assert!(images.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn what_is_no_image_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let images = store(&root.path().join("store"), "");
    let manifest = |text: &'static str| tar_of(&[("manifest.json", text.as_bytes())]);
    let bad_layer = {
        let tar = small_layer("x");
        let config = config_of(&[hashing::digest(b"something else")]);
        let manifest = br#"[{"Config":"c","RepoTags":null,"Layers":["l"]}]"#;
        tar_of(&[("manifest.json", manifest), ("c", &config), ("l", &tar)])
    };
    for (bytes, reason) in [
        (b"no archive".to_vec(), ""),
        (tar_of(&[("other", b"x")]), "neither an OCI image layout"),
        (manifest("[]"), "no image"),
        (manifest("{"), "manifest.json: "),
        (manifest(r#"[{"Config":"../../etc/passwd","Layers":[]}]"#), "is missing"),
        (manifest(r#"[{"Config":"c","RepoTags":["Bad Name"],"Layers":[]}]"#), "not a valid image"),
        (bad_layer, "digest mismatch"),
    ] {
        let path = root.path().join("archive");
        fs::write(&path, bytes).unwrap();
        let said = images.import(&path).await.unwrap_err().to_string();
        assert!(said.contains(reason) && said.contains("archive"), "{said}");
    }
    assert!(images.import(&root.path().join("none")).await.is_err());
    assert!(images.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn an_image_is_made_of_files_of_this_machine() {
    let root = tempfile::tempdir().unwrap();
    let images = store(root.path(), "");
    let files = [
        FileInImage { path: "/bin/sh".into(), source: BUSYBOX.into(), mode: 0o755 },
        FileInImage { path: "etc/hostname".into(), source: "/etc/hostname".into(), mode: 0o644 },
    ];
    let config = ConfigBuilder::default().entrypoint(vec!["/bin/sh".to_owned()]).build().unwrap();
    let image = images.build_from_files("demo", &files, &config).await.unwrap();
    assert_eq!((image.repo_tags.as_slice(), image.pinned), (&["demo:latest".to_owned()][..], true));
    let again = images.build_from_files("demo", &files, &config).await.unwrap();
    assert_eq!(again, image);
    assert_eq!(images.pull("demo", &[]).await.unwrap(), image);
    let layers = images.layers(&image.id).await.unwrap();
    assert_eq!(fs::read(layers[0].join("bin/sh")).unwrap(), fs::read(BUSYBOX).unwrap());
    let outside = [FileInImage { path: "../x".into(), source: BUSYBOX.into(), mode: 0o644 }];
    let outcome = images.build_from_files("demo", &outside, &config).await;
    assert!(matches!(outcome, Err(RuntimeError::Invalid(_))));
}

#[tokio::test]
async fn what_a_killed_process_left_is_removed_and_what_a_living_one_makes_is_not() {
    let root = tempfile::tempdir().unwrap();
    let living = store(root.path(), "");
    let stale = root.path().join("tmp/left");
    fs::create_dir_all(stale.join("half/fs")).unwrap();
    fs::write(root.path().join("tmp/file"), "left").unwrap();
    let next = store(root.path(), "");
    assert!(!stale.exists() && !root.path().join("tmp/file").exists());
    assert_eq!(fs::read_dir(root.path().join("tmp")).unwrap().count(), 2);
    drop(next);
    assert_eq!(fs::read_dir(root.path().join("tmp")).unwrap().count(), 1);
    assert!(living.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn layers_that_another_image_needs_stay() {
    let root = tempfile::tempdir().unwrap();
    let images = store(&root.path().join("store"), "");
    let (shared, own) = (small_layer("shared"), small_layer("own"));
    let mut folders = Vec::new();
    for (name, layers) in [("a", vec![&shared]), ("b", vec![&shared, &own])] {
        let ids: Vec<Digest> = layers.iter().map(|layer| hashing::digest(layer)).collect();
        let config = config_of(&ids);
        let files: Vec<String> = (0..layers.len()).map(|n| n.to_string()).collect();
        let manifest = serde_json::to_vec(&serde_json::json!([
            {"Config": "c", "RepoTags": [format!("{name}:1")], "Layers": files}
        ]))
        .unwrap();
        let mut members = vec![("manifest.json", manifest.as_slice()), ("c", &config)];
        members.extend(files.iter().zip(&layers).map(|(f, layer)| (f.as_str(), layer.as_slice())));
        let path = root.path().join(name);
        fs::write(&path, tar_of(&members)).unwrap();
        let image = images.import(&path).await.unwrap().remove(0);
        folders = images.layers(&image.id).await.unwrap();
    }
    images.remove("b:1", &nobody_uses_it()).await.unwrap();
    assert!(folders[0].exists() && !folders[1].exists());
    images.remove("a:1", &nobody_uses_it()).await.unwrap();
    assert!(!folders[0].exists());
}

/// Imports an image of two layers: the upper one removes a file and empties a folder of the lower.
async fn two_layers(root: &Path) -> Vec<PathBuf> {
    let lower = tar_of(&[("gone", b"x"), ("folder/old", b"x"), ("stays", b"lower")]);
    let upper = {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(0o755);
        header.set_size(0);
        tar.append_data(&mut header, "folder", std::io::empty()).unwrap();
        for (name, content) in [(".wh.gone", ""), ("folder/.wh..wh..opq", ""), ("folder/new", "n")]
        {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, content.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap()
    };
    let config = config_of(&[hashing::digest(&lower), hashing::digest(&upper)]);
    let manifest = br#"[{"Config":"c","RepoTags":["two:1"],"Layers":["0","1"]}]"#;
    let archive = root.join("two.tar");
    let members: [(&str, &[u8]); 4] =
        [("manifest.json", manifest), ("c", &config), ("0", &lower), ("1", &upper)];
    fs::write(&archive, tar_of(&members)).unwrap();
    let images = store(&root.join("store"), "");
    let image = images.import(&archive).await.unwrap().remove(0);
    images.layers(&image.id).await.unwrap()
}

/// In a process with a mount namespace of its own, so that nothing is left behind.
#[test]
fn overlay_stacks_what_was_unpacked() {
    const INSIDE: &str = "KEELSON_TEST_OWN_MOUNTS";
    if std::env::var_os(INSIDE).is_none() {
        let output = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(["images::tests::overlay_stacks_what_was_unpacked", "--exact", "--nocapture"])
            .env(INSIDE, "1")
            .output()
            .expect("unshare (Debian package util-linux) and root are needed");
        let said = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("1 passed"), "{said}{errors}");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let layers = runtime.block_on(two_layers(root.path()));
    let merged = root.path().join("merged");
    fs::create_dir(&merged).unwrap();
    let options = format!("lowerdir={}:{}", layers[1].display(), layers[0].display());
    let none = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("overlay"), &merged, Some("overlay"), none, Some(options.as_str()))
        .unwrap();
    let mut names: Vec<_> = fs::read_dir(&merged)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["folder", "stays"]);
    let inside: Vec<_> =
        fs::read_dir(merged.join("folder")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(inside, ["new"]);
    nix::mount::umount(&merged).unwrap();
}
