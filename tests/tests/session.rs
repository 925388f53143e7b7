//! A user's first session: everything with plain kubectl.

use std::{collections::BTreeSet, io::Read, process::Stdio, time::Duration};

use keelson_tests::{Cluster, DEADLINE, NODE_ADDRESS, pod_is_ready, wait_for};

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/examples");

fn example(name: &str) -> String {
    format!("{EXAMPLES}/{name}")
}

/// Asks until every one of `names` has answered, and nobody else.
fn all_answer(what: &str, names: &BTreeSet<String>, fetch: impl Fn() -> Result<String, String>) {
    let mut seen = BTreeSet::new();
    wait_for(what, DEADLINE, || {
        let answer = fetch()?;
        let name = answer.trim().strip_prefix("hello from ").unwrap_or(&answer).to_owned();
        assert!(names.contains(&name), "{what}: {name:?} is none of {names:?}");
        seen.insert(name);
        if &seen == names { Ok(()) } else { Err(format!("only {seen:?}")) }
    });
}

fn pod_names(cluster: &Cluster, selector: &str) -> BTreeSet<String> {
    let pods = cluster.get(&["pods", "-l", selector]);
    let items = pods["items"].as_array().cloned().unwrap_or_default();
    items
        .iter()
        .filter(|pod| pod_is_ready(pod) && pod["metadata"]["deletionTimestamp"].is_null())
        .filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned))
        .collect()
}

/// A GET request from inside a pod of the busybox image.
fn fetch_in_pod(cluster: &Cluster, pod: &str, url: &str) -> Result<String, String> {
    let output = cluster.try_kubectl(&["exec", pod, "--", "curl", "-sS", "--fail", "-m", "5", url]);
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

#[test]
fn a_first_session_with_kubectl() {
    let mut cluster = Cluster::start(&[]);
    cluster.make_demo_image();
    cluster.make_busybox_image();

    // The examples, each as a user applies it.
    for name in ["pod.yaml", "deployment.yaml", "service.yaml"] {
        cluster.kubectl(&["apply", "-f", &example(name)]);
    }
    cluster.wait_pod_ready("hello");
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    let names = pod_names(&cluster, "app=web");
    assert_eq!(names.len(), 3, "{names:?}");

    // The Service's address and node port, from the node and from outside.
    let service = cluster.get(&["service", "web"]);
    let address = service["spec"]["clusterIP"].as_str().expect("an address").to_owned();
    all_answer("the Service's address", &names, || cluster.fetch(&format!("http://{address}/")));
    all_answer("the node port", &names, || cluster.fetch(&format!("http://{NODE_ADDRESS}:30080/")));
    all_answer("the node port from outside", &names, || {
        cluster.fetch_from_neighbour(&format!("http://{NODE_ADDRESS}:30080/"))
    });

    // From inside another pod, by name and at the node port.
    cluster.kubectl(&[
        "run",
        "client",
        "--image=busybox:test",
        "--restart=Never",
        "--",
        "sleep",
        "3600",
    ]);
    cluster.wait_pod_ready("client");
    let node_port = format!("http://{NODE_ADDRESS}:30080/");
    for url in ["http://web/", "http://web.default.svc.cluster.local/", &node_port] {
        all_answer(&format!("{url} from a pod"), &names, || fetch_in_pod(&cluster, "client", url));
    }

    // A pod behind its own Service.
    cluster.apply(
        "{apiVersion: v1, kind: Pod, metadata: {name: self, labels: {app: self}}, spec: {containers: \
         [{name: c, image: 'busybox:test', command: [sh, -c, 'echo own > /tmp/index.html; exec httpd -f -p 8080 -h /tmp']}]}}",
    );
    cluster.wait_pod_ready("self");
    cluster.kubectl(&["expose", "pod", "self", "--port=80", "--target-port=8080"]);
    wait_for("a pod to reach itself through its Service", DEADLINE, || {
        match fetch_in_pod(&cluster, "self", "http://self.default.svc.cluster.local/")?.as_str() {
            "own\n" => Ok(()),
            other => Err(other.to_owned()),
        }
    });

    // Looking at things.
    let wide = cluster.kubectl(&["get", "nodes,pods,svc", "-A", "-o", "wide"]);
    for word in ["Ready", "Running", "ClusterIP", "NodePort", "10.96.0.1", NODE_ADDRESS] {
        assert!(wide.contains(word), "{word} is missing in\n{wide}");
    }
    let described = cluster.kubectl(&["describe", "pod", "hello"]);
    for word in ["Started", "Pulled", "QoS Class", "Ready"] {
        assert!(described.contains(word), "{word} is missing in\n{described}");
    }
    cluster.kubectl(&["describe", "node"]);
    cluster.kubectl(&["describe", "service", "web"]);
    cluster.kubectl(&["describe", "deployment", "web"]);
    let explained = cluster.kubectl(&["explain", "pod.spec.containers"]);
    assert!(explained.contains("image") && explained.contains("FIELDS"), "{explained}");

    // Logs, also while they are written.
    cluster.apply(
        "{apiVersion: v1, kind: Pod, metadata: {name: counter}, spec: {containers: [{name: c, image: \
         'busybox:test', command: [sh, -c, 'i=0; while true; do echo line $i; i=$((i+1)); sleep 0.1; done']}]}}",
    );
    cluster.wait_pod_ready("counter");
    let mut follow = cluster
        .kubectl_command(&["logs", "-f", "counter"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("kubectl");
    let mut stdout = follow.stdout.take().expect("stdout");
    let (mut text, mut buffer) = (String::new(), [0; 1024]);
    while !text.contains("line 15\n") {
        let read = stdout.read(&mut buffer).expect("read");
        assert!(read > 0, "the log ended: {text}");
        text.push_str(&String::from_utf8_lossy(&buffer[..read]));
    }
    assert!(text.starts_with("line 0\nline 1\n"), "{text}");
    follow.kill().expect("kill");
    follow.wait().expect("wait");
    assert_eq!(cluster.kubectl(&["logs", "counter", "--tail=1"]).lines().count(), 1);

    // Commands in a container: output, exit code, standard input, a terminal.
    assert_eq!(cluster.kubectl(&["exec", "client", "--", "echo", "hi"]), "hi\n");
    let failed = cluster.try_kubectl(&["exec", "client", "--", "sh", "-c", "exit 7"]);
    assert_eq!(failed.status.code(), Some(7), "{failed:?}");
    let output = cluster.try_with_manifest(&["exec", "-i", "client", "--", "cat"], "through stdin");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "through stdin");
    let terminal = cluster
        .machine
        .command("script")
        .args(["-qec", "kubectl exec -it client -- tty", "/dev/null"])
        .env("KUBECONFIG", cluster.machine.data_dir().join("admin.conf"))
        .stdin(Stdio::null())
        .output()
        .expect("script");
    assert!(String::from_utf8_lossy(&terminal.stdout).contains("/dev/pts/"), "{terminal:?}");

    // Files in and out, and the container's own input and output.
    let file = cluster.machine.dir().join("file");
    std::fs::write(&file, "copied").expect("write");
    let (out, back) = (file.display().to_string(), file.with_extension("back"));
    cluster.kubectl(&["cp", &out, "client:/tmp/file"]);
    cluster.kubectl(&["cp", "client:/tmp/file", &back.display().to_string()]);
    assert_eq!(std::fs::read_to_string(&back).expect("the copy"), "copied");
    cluster.apply(
        "{apiVersion: v1, kind: Pod, metadata: {name: echo}, spec: {restartPolicy: Never, containers: \
         [{name: c, image: 'busybox:test', stdin: true, stdinOnce: true, command: [sh, -c, 'read line; echo got $line']}]}}",
    );
    cluster.wait_pod_ready("echo");
    let attached = cluster.try_with_manifest(&["attach", "-i", "echo"], "a line\n");
    let said = String::from_utf8_lossy(&attached.stdout).into_owned();
    assert!(said.contains("got a line"), "{attached:?}");

    // A port of a pod on this machine.
    let mut forward = cluster
        .kubectl_command(&["port-forward", "pod/hello", "18080:8080"])
        .stdout(Stdio::null())
        .spawn()
        .expect("kubectl");
    wait_for("the forwarded port", DEADLINE, || cluster.fetch("http://127.0.0.1:18080/"));
    assert_eq!(cluster.fetch("http://127.0.0.1:18080/").expect("twice"), "hello from hello\n");
    forward.kill().expect("kill");
    forward.wait().expect("wait");

    // Deployments.
    cluster.kubectl(&[
        "create",
        "deployment",
        "made",
        "--image=busybox:test",
        "--replicas=3",
        "--",
        "sleep",
        "3600",
    ]);
    cluster.kubectl(&["rollout", "status", "deployment/made", "--timeout=60s"]);
    cluster.kubectl(&["set", "image", "deployment/made", "busybox=keelson/demo:latest"]);
    cluster.kubectl(&["rollout", "undo", "deployment/made"]);
    cluster.kubectl(&["rollout", "status", "deployment/made", "--timeout=90s"]);
    cluster.kubectl(&["scale", "deployment/made", "--replicas=1"]);
    cluster.wait_object("one replica", &["deployment", "made"], |d| d["status"]["replicas"] == 1);
    let history = cluster.kubectl(&["rollout", "history", "deployment/made"]);
    assert!(history.contains('3'), "{history}");
    cluster.kubectl(&["delete", "deployment", "made", "--timeout=60s"]);
    cluster.wait_object("the pods to go", &["pods", "-l", "app=made"], |pods| {
        pods["items"].as_array().is_some_and(Vec::is_empty)
    });

    // A namespace takes everything in it along.
    cluster.kubectl(&["create", "namespace", "other"]);
    cluster.kubectl(&["-n", "other", "run", "p", "--image=busybox:test", "--", "sleep", "3600"]);
    cluster.wait_object("the pod in it", &["-n", "other", "pod", "p"], pod_is_ready);
    cluster.kubectl(&["delete", "namespace", "other", "--timeout=60s"]);

    let left = cluster.down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}

#[test]
fn a_pod_lives_in_the_cluster() {
    let mut cluster = Cluster::start(&[]);
    cluster.make_busybox_image();
    cluster.kubectl(&["create", "configmap", "settings", "--from-literal=key=value"]);
    cluster.kubectl(&["create", "secret", "generic", "hidden", "--from-literal=password=s3cret"]);
    cluster.apply(
        r#"
apiVersion: v1
kind: Pod
metadata:
  name: p
  labels: {role: test}
spec:
  initContainers:
  - name: first
    image: busybox:test
    command: [sh, -c, 'echo made by init > /shared/file']
    volumeMounts: [{name: shared, mountPath: /shared}]
  - name: sidecar
    image: busybox:test
    restartPolicy: Always
    command: [sleep, '3600']
  containers:
  - name: c
    image: busybox:test
    command: [sleep, '3600']
    env:
    - {name: FROM_MAP, valueFrom: {configMapKeyRef: {name: settings, key: key}}}
    - {name: FROM_SECRET, valueFrom: {secretKeyRef: {name: hidden, key: password}}}
    - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    - {name: EXPANDED, value: 'ip=$(POD_IP) $$(NOT)'}
    - {name: LIMIT, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}
    resources: {limits: {memory: 64Mi, cpu: 500m}}
    securityContext: {readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, seccompProfile: {type: RuntimeDefault}}
    volumeMounts:
    - {name: shared, mountPath: /shared}
    - {name: memory, mountPath: /memory}
    - {name: config, mountPath: /config}
    - {name: info, mountPath: /info}
  volumes:
  - {name: shared, emptyDir: {}}
  - {name: memory, emptyDir: {medium: Memory, sizeLimit: 1Mi}}
  - {name: config, configMap: {name: settings}}
  - name: info
    downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}
"#,
    );
    let pod = cluster.wait_pod_ready("p");
    assert_eq!(pod["status"]["qosClass"], "Burstable", "{pod:#}");
    let exec = |script: &str| cluster.kubectl(&["exec", "p", "-c", "c", "--", "sh", "-c", script]);
    let ip = pod["status"]["podIP"].as_str().expect("an address");
    for (script, expected) in [
        ("cat /shared/file", "made by init".to_owned()),
        ("echo $FROM_MAP $FROM_SECRET", "value s3cret".to_owned()),
        ("echo $EXPANDED", format!("ip={ip} $(NOT)")),
        ("echo $LIMIT", "64".to_owned()),
        ("cat /config/key", "value".to_owned()),
        ("cat /info/labels", "role=\"test\"".to_owned()),
        ("touch /x 2>/dev/null || echo read-only", "read-only".to_owned()),
        ("grep Seccomp: /proc/self/status | tr -d '\\t '", "Seccomp:2".to_owned()),
        ("grep NoNewPrivs /proc/self/status | tr -d '\\t '", "NoNewPrivs:1".to_owned()),
        ("hostname", "p".to_owned()),
        ("grep -cw \"$(hostname)\" /etc/hosts", "1".to_owned()),
        ("echo $KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT", "10.96.0.1:443".to_owned()),
        ("cat /var/run/secrets/kubernetes.io/serviceaccount/namespace", "default".to_owned()),
        (
            "head -1 /var/run/secrets/kubernetes.io/serviceaccount/ca.crt",
            "-----BEGIN CERTIFICATE-----".to_owned(),
        ),
        ("nslookup kubernetes.default.svc.cluster.local | grep -c 10.96.0.1$", "1".to_owned()),
    ] {
        assert_eq!(exec(script).trim(), expected, "{script}");
    }

    // A changed ConfigMap reaches the volume.
    cluster.kubectl(&["patch", "configmap", "settings", "-p", r#"{"data":{"key":"changed"}}"#]);
    wait_for("the changed ConfigMap in the volume", DEADLINE, || {
        let text = exec("cat /config/key");
        if text == "changed" { Ok(()) } else { Err(text) }
    });

    // The pod's token may do what its account may, and no more.
    let token = exec("cat /var/run/secrets/kubernetes.io/serviceaccount/token");
    let with_token = |path: &str| {
        let output = cluster
            .machine
            .command("curl")
            .args(["--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "--cacert"])
            .arg(cluster.machine.data_dir().join("pki/ca.crt"))
            .args(["--header", &format!("Authorization: Bearer {token}")])
            .arg(format!("https://{NODE_ADDRESS}:6443{path}"))
            .output()
            .expect("curl");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert_eq!(with_token("/apis"), "200");
    assert_eq!(with_token("/api/v1/namespaces/default/pods"), "403");
    cluster.kubectl(&["create", "role", "reader", "--verb=get,list", "--resource=pods"]);
    cluster.kubectl(&[
        "create",
        "rolebinding",
        "reader",
        "--role=reader",
        "--serviceaccount=default:default",
    ]);
    wait_for("the role to count", Duration::from_secs(10), || {
        match with_token("/api/v1/namespaces/default/pods").as_str() {
            "200" => Ok(()),
            other => Err(other.to_owned()),
        }
    });
    assert_eq!(with_token("/api/v1/namespaces/default/secrets"), "403");
    cluster.kubectl(&["delete", "pod", "p", "--grace-period=1", "--timeout=60s"]);
    assert_eq!(with_token("/apis"), "401", "the token of a pod that is gone");

    let left = cluster.down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}
