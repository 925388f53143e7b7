//! The `httpGet` probe and hook: one request, redirects on the same host followed, the certificate
//! not verified.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::{Request, Response, StatusCode, body::Incoming, header};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use super::{Outcome, target::HttpTarget, tcp};

/// How many redirects are followed.
const REDIRECTS: usize = 10;

/// Makes the request; 200 to 399 is success.
pub(crate) async fn get(target: &HttpTarget, timeout: Duration, agent: &str) -> Outcome {
    match tokio::time::timeout(timeout, follow(target, agent)).await {
        Ok(outcome) => outcome,
        Err(_) => Outcome::Failure(format!(
            "Get \"{}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)",
            target.url()
        )),
    }
}

/// Makes the request; any answer is success, as for lifecycle hooks.
pub(crate) async fn answers(
    target: &HttpTarget,
    timeout: Duration,
    agent: &str,
) -> Result<(), String> {
    match tokio::time::timeout(timeout, request(target, agent)).await {
        Ok(answer) => {
            answer.map(drop).map_err(|reason| format!("Get \"{}\": {reason}", target.url()))
        }
        Err(_) => Err(format!("Get \"{}\": no answer within {timeout:?}", target.url())),
    }
}

async fn follow(first: &HttpTarget, agent: &str) -> Outcome {
    let mut target = first.clone();
    for _ in 0..=REDIRECTS {
        let answer = match request(&target, agent).await {
            Ok(answer) => answer,
            Err(reason) => return Outcome::Failure(format!("Get \"{}\": {reason}", target.url())),
        };
        let status = answer.status();
        let Some(next) = redirect(&target, &answer) else { return judge(status) };
        if next.host != first.host {
            return Outcome::Warning(
                "Probe terminated redirects, Response body: the redirect leads to another host"
                    .to_owned(),
            );
        }
        target = next;
    }
    Outcome::Failure(format!("Get \"{}\": stopped after {REDIRECTS} redirects", first.url()))
}

fn judge(status: StatusCode) -> Outcome {
    if (200..400).contains(&status.as_u16()) {
        Outcome::Success
    } else {
        Outcome::Failure(format!("HTTP probe failed with statuscode: {}", status.as_u16()))
    }
}

/// Where the answer sends the client, if it does.
fn redirect(from: &HttpTarget, answer: &Response<Incoming>) -> Option<HttpTarget> {
    if !matches!(answer.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return None;
    }
    resolve(from, answer.headers().get(header::LOCATION)?.to_str().ok()?)
}

/// Where a `Location` leads from `from` (RFC 3986, 5.2): it may be a whole URL, one without its
/// scheme, a path from the root or from here, or a query alone.
fn resolve(from: &HttpTarget, location: &str) -> Option<HttpTarget> {
    let mut next = from.clone();
    let location = location.split('#').next().unwrap_or_default();
    let whole = if location.starts_with("//") {
        Some(format!("{}:{location}", if from.tls { "https" } else { "http" }))
    } else {
        let scheme = location.split_once("://").map(|(scheme, _)| scheme);
        let plain = |scheme: &str| scheme.bytes().all(|byte| byte.is_ascii_alphanumeric());
        scheme.filter(|scheme| plain(scheme)).map(|_| location.to_owned())
    };
    if let Some(whole) = whole {
        let uri: hyper::Uri = whole.parse().ok()?;
        next.host = uri.host()?.trim_matches(['[', ']']).to_owned();
        next.tls = uri.scheme_str() == Some("https");
        next.port = uri.port_u16().unwrap_or(if next.tls { 443 } else { 80 });
        next.path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        return Some(next);
    }
    let here = from.path.split('?').next().unwrap_or_default();
    next.path = match location {
        "" => from.path.clone(),
        query if query.starts_with('?') => format!("{here}{query}"),
        path => {
            let folder = here.rsplit_once('/').map_or("", |(folder, _)| folder);
            let joined =
                if path.starts_with('/') { path.to_owned() } else { format!("{folder}/{path}") };
            without_dots(&joined)
        }
    };
    Some(next)
}

/// A path with its `.` and `..` followed; its query is left alone.
fn without_dots(path: &str) -> String {
    let (path, query) = path.split_once('?').map_or((path, None), |(path, q)| (path, Some(q)));
    let mut parts: Vec<&str> = Vec::new();
    let mut all = path.split('/').skip(1).peekable();
    while let Some(part) = all.next() {
        let last = all.peek().is_none();
        match part {
            "." | ".." => {
                if part == ".." {
                    parts.pop();
                }
                if last {
                    parts.push("");
                }
            }
            part => parts.push(part),
        }
    }
    let path = format!("/{}", parts.join("/"));
    query.map_or(path.clone(), |query| format!("{path}?{query}"))
}

async fn request(target: &HttpTarget, agent: &str) -> Result<Response<Incoming>, String> {
    let stream = TcpStream::connect((target.host.as_str(), target.port))
        .await
        .map_err(|error| tcp::dial_error(&target.host, target.port, &error))?;
    if target.tls {
        let name = ServerName::try_from(target.host.clone()).map_err(|error| error.to_string())?;
        let connector = TlsConnector::from(tls_config()?);
        let stream = connector.connect(name, stream).await.map_err(|error| error.to_string())?;
        send(stream, target, agent).await
    } else {
        send(stream, target, agent).await
    }
}

async fn send<S>(stream: S, target: &HttpTarget, agent: &str) -> Result<Response<Incoming>, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let request = build(target, agent)?;
    let exchange =
        async move { sender.send_request(request).await.map_err(|error| error.to_string()) };
    // the connection is driven here and not in a task of its own: it ends with this future
    let mut connection = std::pin::pin!(connection);
    let mut exchange = std::pin::pin!(exchange);
    tokio::select! {
        answer = &mut exchange => answer,
        ended = &mut connection => match ended {
            Ok(()) => exchange.await,
            Err(error) => Err(error.to_string()),
        },
    }
}

fn build(target: &HttpTarget, agent: &str) -> Result<Request<Empty<Bytes>>, String> {
    let mut request = Request::get(target.path.as_str());
    let given = |name: header::HeaderName| {
        target.headers.iter().any(|(key, _)| key.eq_ignore_ascii_case(name.as_str()))
    };
    if !given(header::HOST) {
        request = request.header(header::HOST, target.authority());
    }
    if !given(header::USER_AGENT) {
        request = request.header(header::USER_AGENT, agent);
    }
    if !given(header::ACCEPT) {
        request = request.header(header::ACCEPT, "*/*");
    }
    request = request.header(header::CONNECTION, "close");
    for (name, value) in &target.headers {
        // an empty value takes a default header away, as documented
        if !value.is_empty() {
            request = request.header(name, value);
        }
    }
    request.body(Empty::new()).map_err(|error| error.to_string())
}

fn tls_config() -> Result<Arc<ClientConfig>, String> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Takes any certificate: a probe asks whether a server answers, not who it is (documented).
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_where_clients_go() {
        let from = HttpTarget {
            tls: false,
            host: "10.0.0.5".to_owned(),
            port: 8080,
            path: "/a/b?x=1".to_owned(),
            headers: Vec::new(),
        };
        let rows = [
            ("login", "http://10.0.0.5:8080/a/login"),
            ("/login?y=/z", "http://10.0.0.5:8080/login?y=/z"),
            ("../up/./it", "http://10.0.0.5:8080/up/it"),
            ("./", "http://10.0.0.5:8080/a/"),
            ("?y=2", "http://10.0.0.5:8080/a/b?y=2"),
            ("login?to=http://other/", "http://10.0.0.5:8080/a/login?to=http://other/"),
            ("https://10.0.0.5/x#part", "https://10.0.0.5:443/x"),
            ("//10.0.0.6:81/x", "http://10.0.0.6:81/x"),
        ];
        for (location, url) in rows {
            let next = resolve(&from, location).map(|next| next.url());
            assert_eq!(next.as_deref(), Some(url), "{location}");
        }
    }
}
