//! Logs, exec, attach, port-forward and proxies: what is answered by a kubelet, a pod or a Service,
//! and only passed on here.
//!
//! ```text
//!   client ──► API server ── TLS, client certificate ──► kubelet of the pod's node
//!                 │              (its serving certificate is verified)
//!                 └─ 101: both connections become pipes, spliced until one of them closes
//! ```
//!
//! Protocols (SPDY/3.1, WebSocket subprotocols) are between the client and the kubelet: the bytes
//! are passed on as they are.

mod headers;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::{Request, StatusCode, Uri, header};
use http_body_util::BodyExt;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

pub(crate) use self::headers::TOKEN_PROTOCOL;
use self::headers::{HOP_BY_HOP, forwarded};
use super::{
    core::{Call, Core, Target, text},
    refusal,
    respond::{self, Answer},
    service::{RequestBody, empty},
};
use crate::{
    admission::Operation,
    registry::Resource,
    status::{FieldError, Status},
};

/// How long a kubelet or pod may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const KUBELET_PORT: u16 = 10250;

/// Where a request is passed on to.
#[derive(Debug)]
struct Backend {
    address: String,
    port: u16,
    /// Present: over TLS, to the kubelet of this name.
    tls: Option<Arc<rustls::ClientConfig>>,
    path_and_query: String,
}

/// Answers a stream or proxy request.
pub(crate) async fn serve(
    core: &Arc<Core>,
    call: &Call,
    resource: &Arc<Resource>,
    request: Request<RequestBody>,
) -> Result<Answer, Status> {
    let backend = match (resource.plural.as_str(), call.info.subresource.as_str()) {
        ("nodes", "proxy") => node_proxy(core, call).await?,
        ("pods", "proxy") => pod_proxy(core, call).await?,
        ("services", "proxy") => service_proxy(core, call).await?,
        ("pods", subresource) => {
            let info = &call.info;
            let pod = object(core, "pods", &info.namespace, &info.name).await?;
            let target = Target {
                namespace: &call.info.namespace,
                name: &call.info.name,
                subresource,
                old: Some(&pod),
            };
            if subresource != "log" {
                core.admit(call, resource, Operation::Connect, target, false, None)?;
            }
            let backend = to_kubelet(core, call, &pod, subresource)?;
            let Some(backend) = backend else {
                // As Kubernetes answers for a pod that has no node yet: it has said nothing.
                return Ok(respond::respond(StatusCode::OK, "text/plain", empty()));
            };
            backend
        }
        _ => return Err(Status::unknown_path()),
    };
    pass_on(core, call, backend, request).await
}

async fn object(
    core: &Core,
    plural: &str,
    namespace: &str,
    name: &str,
) -> Result<Arc<Value>, Status> {
    let resource = core.registry.resource("", "v1", plural).ok_or_else(Status::unknown_path)?;
    core.current(resource, namespace, name).await
}

/// The containers of a pod that may be named.
fn containers(pod: &Value) -> Vec<&str> {
    ["initContainers", "containers", "ephemeralContainers"]
        .iter()
        .filter_map(|field| pod.pointer(&format!("/spec/{field}"))?.as_array())
        .flatten()
        .map(|container| text(container, "/name"))
        .collect()
}

/// The container that a request means.
fn container<'a>(pod: &'a Value, asked: Option<&'a str>) -> Result<&'a str, Status> {
    let name = text(pod, "/metadata/name");
    let regular: Vec<&str> = pod
        .pointer("/spec/containers")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(|container| text(container, "/name"))
        .collect();
    match asked {
        None => match regular.as_slice() {
            [only] => Ok(only),
            _ => Err(Status::bad_request(format!(
                "a container name must be specified for pod {name}, choose one of: [{}]",
                regular.join(" ")
            ))),
        },
        Some(asked) if containers(pod).contains(&asked) => Ok(asked),
        Some(asked) => {
            Err(Status::bad_request(format!("container {asked} is not valid for pod {name}")))
        }
    }
}

/// A query with only these parameters, renamed.
fn query(call: &Call, names: &[(&str, &str)]) -> String {
    let mut pairs = Vec::new();
    for (name, renamed) in names {
        for value in call.info.query.all(name) {
            pairs.push(format!("{renamed}={}", percent_encode(value)));
        }
    }
    pairs.join("&")
}

fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// Where a pod's subresource is answered; `None` for the logs of a pod that has no node yet.
fn to_kubelet(
    core: &Core,
    call: &Call,
    pod: &Value,
    subresource: &str,
) -> Result<Option<Backend>, Status> {
    let node_name = text(pod, "/spec/nodeName");
    let asked = call.info.query.get("container");
    let pod_path = format!("{}/{}", text(pod, "/metadata/namespace"), text(pod, "/metadata/name"));
    let (path, parameters) = match subresource {
        "log" => {
            let container = container(pod, asked)?;
            check_log_options(call)?;
            let names = [
                "follow",
                "previous",
                "sinceSeconds",
                "sinceTime",
                "timestamps",
                "tailLines",
                "limitBytes",
                "stream",
            ];
            let parameters = query(call, &names.map(|name| (name, name)));
            (format!("/containerLogs/{pod_path}/{container}"), parameters)
        }
        "exec" | "attach" => {
            let container = container(pod, asked)?;
            let streams = ["stdin", "stdout", "stderr"];
            if !streams.iter().any(|stream| call.info.query.flag(stream)) {
                return Err(Status::bad_request(
                    "you must specify at least 1 of stdin, stdout, stderr",
                ));
            }
            if subresource == "exec" && call.info.query.get("command").is_none() {
                return Err(Status::bad_request("you must specify at least 1 command to exec"));
            }
            // The kubelet's own names for them.
            let mut parameters: Vec<String> =
                [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty")]
                    .iter()
                    .filter(|(name, _)| call.info.query.flag(name))
                    .map(|(_, renamed)| format!("{renamed}=1"))
                    .collect();
            if subresource == "exec" {
                parameters.push(query(call, &[("command", "command")]));
            }
            (format!("/{subresource}/{pod_path}/{container}"), parameters.join("&"))
        }
        // `ports` for WebSocket clients; with SPDY the ports come with the streams.
        _ => (format!("/portForward/{pod_path}"), query(call, &[("ports", "port")])),
    };
    if node_name.is_empty() && subresource == "log" {
        return Ok(None);
    }
    if node_name.is_empty() {
        let name = text(pod, "/metadata/name");
        return Err(Status::bad_request(format!("pod {name} does not have a host assigned")));
    }
    let path_and_query = if parameters.is_empty() { path } else { format!("{path}?{parameters}") };
    kubelet(core, node_name, path_and_query).map(Some)
}

fn check_log_options(call: &Call) -> Result<(), Status> {
    let query = &call.info.query;
    let mut errors = Vec::new();
    for (name, least) in [("tailLines", 0), ("limitBytes", 1), ("sinceSeconds", 1)] {
        if let Some(number) = query.number(name)?
            && number < least
        {
            let why = format!("must be greater than or equal to {least}");
            errors.push(FieldError::invalid(name, number, why));
        }
    }
    if query.get("sinceSeconds").is_some() && query.get("sinceTime").is_some() {
        let why = "at most one of `sinceTime` or `sinceSeconds` may be specified";
        errors.push(FieldError::forbidden("sinceSeconds", why));
    }
    if errors.is_empty() {
        Ok(())
    } else {
        Err(Status::invalid("", "PodLogOptions", &call.info.name, &errors))
    }
}

/// A node's kubelet.
fn kubelet(core: &Core, node_name: &str, path_and_query: String) -> Result<Backend, Status> {
    use crate::lookup::Lookup as _;
    let node = core
        .cache
        .get("", "nodes", None, node_name)
        .ok_or_else(|| Status::not_found("", "nodes", node_name))?;
    let addresses = node.pointer("/status/addresses").and_then(Value::as_array);
    let address_of = |kind: &str| {
        let mut of_kind = addresses.into_iter().flatten().filter(|a| text(a, "/type") == kind);
        of_kind.next().map(|address| text(address, "/address").to_owned())
    };
    let address = ["InternalIP", "Hostname", "InternalDNS", "ExternalDNS", "ExternalIP"]
        .iter()
        .find_map(|kind| address_of(kind))
        .filter(|address| !address.is_empty())
        .ok_or_else(|| {
            Status::internal(format!("no preferred addresses found for node {node_name:?}"))
        })?;
    let port = node.pointer("/status/daemonEndpoints/kubeletEndpoint/Port").and_then(Value::as_u64);
    let tls = core.kubelet_tls.clone().ok_or_else(|| {
        Status::unavailable("this API server was set up without a certificate for kubelets")
    })?;
    Ok(Backend {
        address,
        port: port.and_then(|p| u16::try_from(p).ok()).filter(|p| *p != 0).unwrap_or(KUBELET_PORT),
        tls: Some(tls),
        path_and_query,
    })
}

/// The path and query of a proxied request, as the backend gets them.
fn proxied(call: &Call) -> String {
    let info = &call.info;
    match info.raw_query.as_deref() {
        None | Some("") => format!("/{}", info.rest),
        Some(query) => format!("/{}?{query}", info.rest),
    }
}

async fn node_proxy(core: &Core, call: &Call) -> Result<Backend, Status> {
    core.catch_up().await?;
    let (scheme, name, port) = split(&call.info.name);
    if scheme == "http" {
        return Err(Status::bad_request("kubelets are reached over https only"));
    }
    let mut backend = kubelet(core, name, proxied(call))?;
    if !port.is_empty() {
        backend.port = number(port)?;
    }
    Ok(backend)
}

/// `[scheme:]name[:port]`
fn split(text: &str) -> (&str, &str, &str) {
    let parts: Vec<&str> = text.split(':').collect();
    match parts.as_slice() {
        [name] => ("", name, ""),
        [name, port] => ("", name, port),
        [scheme, name, port] => (scheme, name, port),
        _ => ("", text, ""),
    }
}

fn number(port: &str) -> Result<u16, Status> {
    port.parse()
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| Status::bad_request(format!("{port:?} is not a port number")))
}

fn plain_only(scheme: &str) -> Result<(), Status> {
    match scheme {
        "" | "http" => Ok(()),
        // The certificates of pods are nobody's that could be verified here.
        other => Err(Status::bad_request(format!("the proxy speaks http to pods, not {other:?}"))),
    }
}

async fn pod_proxy(core: &Core, call: &Call) -> Result<Backend, Status> {
    let (scheme, name, port) = split(&call.info.name);
    plain_only(scheme)?;
    let pod = object(core, "pods", &call.info.namespace, name).await?;
    let port = if port.is_empty() {
        pod.pointer("/spec/containers/0/ports/0/containerPort")
            .and_then(Value::as_u64)
            .and_then(|port| u16::try_from(port).ok())
            .unwrap_or(80)
    } else {
        number(port)?
    };
    let address = pod_address(text(&pod, "/status/podIP"))
        .ok_or_else(|| Status::unavailable(format!("pod {name} has no address yet")))?;
    Ok(Backend { address, port, tls: None, path_and_query: proxied(call) })
}

/// An address to which the API server may go on behalf of a user: none of its own machine's.
fn pod_address(address: &str) -> Option<String> {
    let ip: IpAddr = address.parse().ok()?;
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    (!ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast() && !link_local)
        .then(|| ip.to_string())
}

/// One of the ready endpoints of a Service's port.
async fn service_proxy(core: &Core, call: &Call) -> Result<Backend, Status> {
    use crate::lookup::Lookup as _;
    let namespace = call.info.namespace.as_str();
    let (scheme, name, port) = split(&call.info.name);
    plain_only(scheme)?;
    let service = object(core, "services", namespace, name).await?;
    let ports = service.pointer("/spec/ports").and_then(Value::as_array);
    let ports: Vec<&Value> = ports.into_iter().flatten().collect();
    let chosen = match port {
        "" if ports.len() == 1 => ports.first().copied(),
        wanted => ports.iter().copied().find(|p| {
            text(p, "/name") == wanted
                || p.get("port").and_then(Value::as_u64).is_some_and(|n| n.to_string() == wanted)
        }),
    };
    let unavailable =
        || Status::unavailable(format!("no endpoints available for service {name:?}"));
    let port_name = text(chosen.ok_or_else(unavailable)?, "/name");
    let mut candidates = Vec::new();
    for slice in core.cache.list("discovery.k8s.io", "endpointslices", Some(namespace)) {
        let of =
            slice.pointer("/metadata/labels").and_then(|l| l.get("kubernetes.io/service-name"));
        if of.and_then(Value::as_str) != Some(name) {
            continue;
        }
        let ports = slice.get("ports").and_then(Value::as_array);
        let Some(port) = ports
            .into_iter()
            .flatten()
            .find(|port| text(port, "/name") == port_name)
            .and_then(|port| u16::try_from(port.get("port")?.as_u64()?).ok())
        else {
            continue;
        };
        for endpoint in slice.get("endpoints").and_then(Value::as_array).into_iter().flatten() {
            let ready = endpoint.pointer("/conditions/ready").and_then(Value::as_bool);
            if ready != Some(false)
                && let Some(address) = pod_address(text(endpoint, "/addresses/0"))
            {
                candidates.push((address, port));
            }
        }
    }
    if candidates.is_empty() {
        return Err(unavailable());
    }
    let (address, port) = candidates.swap_remove(rand::random_range(0..candidates.len()));
    Ok(Backend { address, port, tls: None, path_and_query: proxied(call) })
}

trait Pipe: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Pipe for T {}

async fn connect(backend: &Backend) -> Result<Box<dyn Pipe>, Status> {
    let (address, port) = (backend.address.as_str(), backend.port);
    let failed = |problem: &dyn std::fmt::Display| {
        Status::unavailable(format!("error dialing backend {address}:{port}: {problem}"))
    };
    let connecting = async {
        let stream = match address.parse::<IpAddr>() {
            Ok(ip) => TcpStream::connect(SocketAddr::new(ip, port)).await,
            Err(_) => TcpStream::connect((address, port)).await,
        }
        .map_err(|error| failed(&error))?;
        stream.set_nodelay(true).map_err(|error| failed(&error))?;
        let Some(tls) = &backend.tls else { return Ok(Box::new(stream) as Box<dyn Pipe>) };
        let name = ServerName::try_from(address.to_owned()).map_err(|error| failed(&error))?;
        // Upgrades are a matter of HTTP/1.1.
        let mut config = rustls::ClientConfig::clone(tls);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, stream).await.map_err(|error| failed(&error))?;
        Ok(Box::new(stream) as Box<dyn Pipe>)
    };
    match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(connected) => connected,
        Err(_) => Err(failed(&"it did not answer in time")),
    }
}

/// Sends the request to the backend, and its answer back.
async fn pass_on(
    core: &Arc<Core>,
    call: &Call,
    backend: Backend,
    mut request: Request<RequestBody>,
) -> Result<Answer, Status> {
    let upgrade = request.headers().contains_key(header::UPGRADE);
    let client = upgrade.then(|| hyper::upgrade::on(&mut request));
    let open = core.metrics.long_running(&call.info);
    let stream = connect(&backend).await?;
    let broken = |error: hyper::Error| {
        let (address, port) = (&backend.address, backend.port);
        Status::unavailable(format!("the connection to {address}:{port} broke off: {error}"))
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let shutdown = core.shutdown.clone();
    core.tasks.spawn(async move {
        tokio::select! {
            // How it ended is seen by whoever reads the answer.
            _ = connection.with_upgrades() => {}
            () = shutdown.cancelled() => {}
        }
    });
    let (parts, body) = request.into_parts();
    let mut outgoing = Request::new(body);
    *outgoing.method_mut() = parts.method;
    *outgoing.uri_mut() = backend
        .path_and_query
        .parse::<Uri>()
        .map_err(|error| Status::bad_request(format!("the path cannot be passed on: {error}")))?;
    *outgoing.headers_mut() = forwarded(&parts.headers, upgrade);
    let host = authority(&backend)?;
    outgoing.headers_mut().insert(header::HOST, host);
    let mut answer = sender.send_request(outgoing).await.map_err(broken)?;
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
        let Some(client) = client else {
            return Err(Status::bad_request("Upgrade request required"));
        };
        let server = hyper::upgrade::on(&mut answer);
        let (mut parts, _) = answer.into_parts();
        let shutdown = core.shutdown.clone();
        core.tasks.spawn(async move {
            let _open = open;
            let splice = async {
                let (client, server) = tokio::join!(client, server);
                if let (Ok(client), Ok(server)) = (client, server) {
                    let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
                    // Either end may go at any time; that is how these streams end.
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                }
            };
            tokio::select! {
                () = splice => {}
                () = shutdown.cancelled() => {}
            }
        });
        parts.headers.remove(header::TRANSFER_ENCODING);
        return Ok(Answer::from_parts(parts, empty()));
    }
    // What is proxied is passed on as it is; an answer of ours has our form.
    if call.info.subresource == "log" && !answer.status().is_success() {
        return Err(refusal::status(answer).await);
    }
    let (mut parts, body) = answer.into_parts();
    for name in HOP_BY_HOP {
        parts.headers.remove(name);
    }
    // The gauge goes down when the answer is over.
    let body = body.map_err(Into::into).map_frame(move |frame| {
        let _open = &open;
        frame
    });
    Ok(Answer::from_parts(parts, body.boxed_unsync()))
}

fn authority(backend: &Backend) -> Result<http::HeaderValue, Status> {
    let host = match backend.address.parse::<IpAddr>() {
        Ok(IpAddr::V6(ip)) => format!("[{ip}]:{}", backend.port),
        _ => format!("{}:{}", backend.address, backend.port),
    };
    host.parse().map_err(Status::internal)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_container_is_found_or_asked_for() {
        let one = json!({"metadata": {"name": "p"}, "spec": {
            "initContainers": [{"name": "i"}], "containers": [{"name": "a"}]}});
        assert_eq!(container(&one, None).unwrap(), "a");
        assert_eq!(container(&one, Some("i")).unwrap(), "i");
        assert!(container(&one, Some("x")).is_err());
        let two = json!({"metadata": {"name": "p"}, "spec": {
            "containers": [{"name": "a"}, {"name": "b"}]}});
        let error = container(&two, None).unwrap_err();
        assert!(error.message.ends_with("choose one of: [a b]"), "{error}");
    }

    #[test]
    fn names_may_carry_scheme_and_port() {
        assert_eq!(split("web"), ("", "web", ""));
        assert_eq!(split("web:http"), ("", "web", "http"));
        assert_eq!(split("http:web:80"), ("http", "web", "80"));
        assert!(pod_address("127.0.0.1").is_none() && pod_address("169.254.169.254").is_none());
        assert_eq!(pod_address("10.244.0.7").as_deref(), Some("10.244.0.7"));
    }
}
