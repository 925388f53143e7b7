//! Client certificates that are no good, over TLS.

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

use super::fixture::{World, world};
use crate::pki::{self, CertificateAndKey, ClusterPki, Leaf, PkiConfig};

/// A client that shows a certificate and, with one, a token.
async fn client(world: &World, files: &CertificateAndKey, token: Option<&str>) -> Client {
    let text = pki::kubeconfig(&pki::Kubeconfig {
        server_url: &format!("https://{}", world.server.address()),
        ca_pem: world.pki.ca_pem(),
        client: files,
        cluster: "c",
        user: "u",
        context: "u@c",
        extension: None,
    });
    let mut kubeconfig = Kubeconfig::from_yaml(&text).unwrap();
    let user = kubeconfig.auth_infos[0].auth_info.as_mut().unwrap();
    user.token = token.map(|token| token.to_owned().into());
    let options = KubeConfigOptions::default();
    let config = Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap();
    Client::try_from(config).unwrap()
}

/// The code of the answer to a question that a known user gets an answer to.
async fn code(client: &Client) -> u16 {
    let request = http::Request::get("/api").body(kube::client::Body::empty()).unwrap();
    client.send(request).await.expect("the handshake succeeds").status().as_u16()
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_401_and_leaves_room_for_a_token() {
    let world = world().await;
    let dir = tempfile::TempDir::new().unwrap();
    let config = PkiConfig {
        node_name: "elsewhere".into(),
        advertise_addresses: Vec::new(),
        service_ip: "10.96.0.1".parse().unwrap(),
        cluster_domain: "cluster.local".into(),
        extra_sans: Vec::new(),
    };
    let stranger = ClusterPki::load_or_create(dir.path(), &config).unwrap();
    let stranger = stranger.certificate(Leaf::Admin);
    assert_eq!(code(&client(&world, &stranger, None).await).await, 401);
    assert_eq!(code(&client(&world, &stranger, Some("x")).await).await, 401);
    // A server's certificate is nobody's.
    let server = world.pki.certificate(Leaf::ApiServer);
    assert_eq!(code(&client(&world, &server, None).await).await, 401);
    assert_eq!(code(&client(&world, &world.pki.certificate(Leaf::Admin), None).await).await, 200);

    world.service_account().await;
    let request = serde_json::json!({"apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest", "spec": {}});
    let path = "/api/v1/namespaces/default/serviceaccounts/default/token";
    let answer = world.must("POST", path, Some(request)).await;
    let token = answer["status"]["token"].as_str().unwrap();
    assert_eq!(code(&client(&world, &stranger, Some(token)).await).await, 200);
}
