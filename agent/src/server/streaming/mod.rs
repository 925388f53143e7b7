//! exec, attach and port-forward: byte streams between a client and a container.
//!
//! Two transports carry the same few streams, and the rest of the folder does not know which:
//!
//! * `websocket`: what clients since 1.29 use.
//! * `spdy`: what older ones use, and port-forward inside a WebSocket.
//!
//! `remote` runs a command's streams over either, `port_forward` the connections to a pod's ports.
//! A connection is upgraded first; what fails after that is said on the stream for errors.

mod port_forward;
mod remote;
mod spdy;
mod websocket;

use http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use hyper::{body::Incoming, upgrade::OnUpgrade};

pub(super) use port_forward::port_forward;
pub(super) use remote::{Command, run};

use super::answer::{Answer, refused, text};

/// Subprotocols of exec and attach over WebSocket, the best first.
const REMOTE_PROTOCOLS: [&str; 2] = ["v5.channel.k8s.io", "v4.channel.k8s.io"];
/// And over SPDY.
const REMOTE_SPDY_PROTOCOLS: [&str; 1] = ["v4.channel.k8s.io"];
/// Subprotocols of port-forward over WebSocket: a whole SPDY connection, or two channels a port.
const FORWARD_TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
const FORWARD_PROTOCOLS: [&str; 2] = [FORWARD_TUNNEL, "v4.channel.k8s.io"];
/// And over SPDY.
const FORWARD_SPDY_PROTOCOLS: [&str; 1] = ["portforward.k8s.io"];

/// How a client wants to go on after the upgrade.
enum Transport {
    /// WebSocket with this subprotocol.
    WebSocket(&'static str),
    /// SPDY/3.1.
    Spdy,
}

/// A connection that is about to be upgraded.
struct Upgrade {
    transport: Transport,
    pending: OnUpgrade,
}

/// Looks at what the client asks for, and makes the `101` answer for it.
fn upgrade(
    request: &mut Request<Incoming>,
    web_socket: &[&'static str],
    spdy: &[&'static str],
) -> Result<(Upgrade, Answer), Box<Answer>> {
    let headers = request.headers();
    let has = |name: header::HeaderName, wanted: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .any(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(wanted)))
    };
    let refuse = |why: &str| Box::new(refused(StatusCode::BAD_REQUEST, why));
    if !has(header::CONNECTION, "upgrade") {
        return Err(refuse("an upgrade to WebSocket or SPDY/3.1 is required"));
    }
    let mut answer = text(StatusCode::SWITCHING_PROTOCOLS, "");
    answer.headers_mut().clear();
    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    let transport = if has(header::UPGRADE, "websocket") {
        let key = headers
            .get(header::SEC_WEBSOCKET_KEY)
            .ok_or_else(|| refuse("a WebSocket needs a Sec-WebSocket-Key"))?;
        let accept = tokio_tungstenite::tungstenite::handshake::derive_accept_key(key.as_bytes());
        let protocol =
            chosen(headers, header::SEC_WEBSOCKET_PROTOCOL, web_socket).ok_or_else(|| {
                refuse(&format!("none of the subprotocols {web_socket:?} was offered"))
            })?;
        let out = answer.headers_mut();
        out.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        out.insert(
            header::SEC_WEBSOCKET_ACCEPT,
            HeaderValue::from_str(&accept).map_err(|_| refuse("a bad Sec-WebSocket-Key"))?,
        );
        out.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
        Transport::WebSocket(protocol)
    } else if has(header::UPGRADE, "SPDY/3.1") {
        const VERSION: header::HeaderName =
            header::HeaderName::from_static("x-stream-protocol-version");
        let protocol = chosen(headers, VERSION, spdy)
            .ok_or_else(|| refuse(&format!("none of the stream protocols {spdy:?} was offered")))?;
        let out = answer.headers_mut();
        out.insert(header::UPGRADE, HeaderValue::from_static("SPDY/3.1"));
        out.insert(VERSION, HeaderValue::from_static(protocol));
        Transport::Spdy
    } else {
        return Err(refuse("an upgrade to WebSocket or SPDY/3.1 is required"));
    };
    let pending = hyper::upgrade::on(request);
    Ok((Upgrade { transport, pending }, answer))
}

/// The first of `known` that the client offers.
fn chosen(
    headers: &HeaderMap,
    name: header::HeaderName,
    known: &[&'static str],
) -> Option<&'static str> {
    let offered: Vec<&str> = headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .collect();
    known.iter().find(|protocol| offered.contains(protocol)).copied()
}
