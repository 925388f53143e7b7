//! The real kubectl over TLS.

use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, BufReader};

use super::fixture::{World, world};

async fn ok(world: &World, arguments: &[&str], input: &str) -> String {
    let (success, text) = world.kubectl(arguments, input).await;
    assert!(success, "kubectl {arguments:?}: {text}");
    text
}

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, labels: {app: web}}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers: [{name: web, image: 'local/web:1', ports: [{containerPort: 8080}]}]
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_users_session() {
    let world = world().await;
    let version = ok(&world, &["version"], "").await;
    assert!(version.contains("Server Version: v1.36.0+keelson"), "{version}");
    let resources = ok(&world, &["api-resources"], "").await;
    assert!(resources.contains("deployments") && resources.contains("deploy "), "{resources}");
    let namespaces = ok(&world, &["get", "ns"], "").await;
    assert!(namespaces.contains("kube-system") && namespaces.contains("Active"), "{namespaces}");

    let applied = ok(&world, &["apply", "-f", "-"], SERVICE).await;
    assert!(applied.contains("service/web created"), "{applied}");
    let applied = ok(&world, &["apply", "-f", "-"], SERVICE).await;
    assert!(applied.contains("deployment.apps/web unchanged"), "{applied}");
    let changed = SERVICE.replace("replicas: 2", "replicas: 3");
    let applied = ok(&world, &["apply", "-f", "-"], &changed).await;
    assert!(applied.contains("deployment.apps/web configured"), "{applied}");
    let server_side = ["apply", "--server-side", "--field-manager=me", "-f", "-"];
    let (success, text) =
        world.kubectl(&server_side, &SERVICE.replace("replicas: 2", "replicas: 4")).await;
    assert!(!success && text.contains("conflict"), "{text}");
    let forced = [&server_side[..], &["--force-conflicts"]].concat();
    ok(&world, &forced, &SERVICE.replace("replicas: 2", "replicas: 4")).await;
    let wide = ok(&world, &["get", "svc,deploy", "-o", "wide"], "").await;
    assert!(wide.contains("80:3") && wide.contains("0/4"), "{wide}");
    let yaml = ok(&world, &["get", "deploy", "web", "-o", "yaml"], "").await;
    assert!(yaml.contains("image: local/web:1"), "{yaml}");
    let described = ok(&world, &["describe", "svc", "web"], "").await;
    assert!(described.contains("NodePort:"), "{described}");
    let explained = ok(&world, &["explain", "pod.spec.containers"], "").await;
    assert!(explained.contains("image"), "{explained}");
    ok(&world, &["scale", "deploy", "web", "--replicas=5"], "").await;
    ok(&world, &["label", "deploy", "web", "tier=front"], "").await;
    let set = ok(&world, &["set", "image", "deploy/web", "web=local/web:2"], "").await;
    assert!(set.contains("image updated"), "{set}");
    let selected = ok(&world, &["get", "deploy", "-l", "tier=front", "-o", "name"], "").await;
    assert_eq!(selected.trim(), "deployment.apps/web");
    let bad = SERVICE.replace("replicas: 2", "replicaz: 2");
    let (success, text) = world.kubectl(&["apply", "-f", "-"], &bad).await;
    assert!(!success && text.contains("unknown field \"spec.replicaz\""), "{text}");
    // These send protobuf.
    ok(&world, &["create", "deployment", "typed", "--image=local/web:1", "--replicas=3"], "").await;
    ok(&world, &["expose", "deployment", "typed", "--port=80", "--target-port=8080"], "").await;
    ok(&world, &["create", "secret", "generic", "s", "--from-literal=k=v"], "").await;
    let secret = ok(&world, &["get", "secret", "s", "-o", "jsonpath={.data.k}"], "").await;
    assert_eq!(secret, "dg==");
    let typed = ["get", "deploy,svc", "typed", "-o", "wide"];
    let typed = ok(&world, &typed, "").await;
    assert!(typed.contains("0/3") && typed.contains("80/TCP"), "{typed}");
    ok(&world, &["auth", "can-i", "create", "pods"], "").await;
    let (allowed, who) =
        world.kubectl(&["auth", "can-i", "create", "pods", "--as=nobody"], "").await;
    assert!(!allowed && who.contains("no"), "{who}");
    let (success, text) = world.kubectl(&["get", "pods", "--as=nobody"], "").await;
    assert!(!success && text.contains("User \"nobody\" cannot list resource"), "{text}");
    let deleted = ok(&world, &["delete", "svc", "web", "--wait=true"], "").await;
    assert!(deleted.contains("\"web\" deleted"), "{deleted}");
    ok(&world, &["delete", "deploy", "web", "--cascade=background"], "").await;
}

const CONFIG_MAP: &str = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: NAME}\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn get_dash_w_sees_what_happens() {
    let world = world().await;
    ok(&world, &["create", "-f", "-"], &CONFIG_MAP.replace("NAME", "a")).await;
    let mut child = world.kubectl_command(&["get", "configmaps", "-w"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = async || {
        let line = tokio::time::timeout(Duration::from_secs(20), lines.next_line()).await;
        line.expect("a line in time").unwrap().unwrap()
    };
    assert!(next().await.starts_with("NAME"));
    assert!(next().await.starts_with("a "));
    ok(&world, &["create", "-f", "-"], &CONFIG_MAP.replace("NAME", "b")).await;
    assert!(next().await.starts_with("b "));
    child.kill().await.unwrap();
}
