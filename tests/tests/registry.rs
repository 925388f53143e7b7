//! Images from a real registry on the machine's loopback.

use std::{fs, process::Stdio};

use keelson_tests::{Cluster, DEADLINE, pod_is_ready, stdout_of, wait_for};

const REGISTRY: &str = "127.0.0.1:5000";

#[test]
fn an_image_is_pulled_once_it_is_there() {
    let mut cluster = Cluster::start(&["--insecure-registry", REGISTRY]);
    let dir = cluster.machine.dir().to_owned();
    let config = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{REGISTRY}'}}\n",
        dir.join("registry").display()
    );
    fs::write(dir.join("registry.yml"), config).expect("config");
    let mut registry = cluster
        .machine
        .command("docker-registry")
        .arg("serve")
        .arg(dir.join("registry.yml"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("docker-registry");
    wait_for("the registry", DEADLINE, || cluster.fetch(&format!("http://{REGISTRY}/v2/")));

    // Not there yet: a clear message, and a back-off.
    cluster.apply(&format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: pulled}}, spec: {{containers: [{{name: c, image: \
         '{REGISTRY}/tools/busybox:1', command: [sleep, '3600']}}]}}}}"
    ));
    let pod = cluster.wait_object("a failed pull", &["pod", "pulled"], |pod| {
        let reason = &pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"];
        reason == "ErrImagePull" || reason == "ImagePullBackOff"
    });
    assert!(!pod_is_ready(&pod));
    wait_for("the event", DEADLINE, || {
        let events = cluster.kubectl(&["events", "--for", "pod/pulled"]);
        if events.contains("Failed to pull image") && events.contains("not found") {
            Ok(())
        } else {
            Err(events)
        }
    });

    // Put there with plain HTTP requests, it is pulled at the next try.
    let script = format!(
        r#"set -eu
cd {dir}
mkdir -p push && cd push && tar -xf ../busybox.tar
push() {{ # file
  digest=sha256:$(sha256sum "$1" | cut -d' ' -f1)
  location=$(curl -sS -f -X POST -D - -o /dev/null http://{REGISTRY}/v2/tools/busybox/blobs/uploads/ | tr -d '\r' | sed -n 's/^Location: //p')
  case "$location" in *\?*) sep='&' ;; *) sep='?' ;; esac
  curl -sS -f -X PUT -H 'Content-Type: application/octet-stream' --data-binary @"$1" "$location${{sep}}digest=$digest" >&2
  echo "$digest $(stat -c %s "$1")"
}}
gzip -c layer.tar > layer.tar.gz
set -- $(push config.json) $(push layer.tar.gz)
cat > manifest <<EOF
{{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
"config": {{"mediaType": "application/vnd.oci.image.config.v1+json", "digest": "$1", "size": $2}},
"layers": [{{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": "$3", "size": $4}}]}}
EOF
curl -sS -f -X PUT -H 'Content-Type: application/vnd.oci.image.manifest.v1+json' --data-binary @manifest http://{REGISTRY}/v2/tools/busybox/manifests/1
"#,
        dir = dir.display()
    );
    keelson_tests::write_busybox_archive(&dir.join("busybox.tar"), "busybox:test");
    let output = cluster.machine.command("bash").args(["-c", &script]).output().expect("bash");
    stdout_of("push", &output);
    let pod = cluster.wait_pod_ready("pulled");
    let id =
        pod["status"]["containerStatuses"][0]["imageID"].as_str().unwrap_or_default().to_owned();
    assert!(id.contains("@sha256:"), "{id}");
    let listed = cluster.machine.keelson(&["image", "ls"]).output().expect("the binary");
    assert!(stdout_of("image ls", &listed).contains("tools/busybox:1"));
    registry.kill().expect("kill");
    registry.wait().expect("wait");

    let left = cluster.down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}
