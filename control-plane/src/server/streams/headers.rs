//! Which headers of a client's request are passed on.

use http::{HeaderMap, HeaderName, header};

/// What the WebSocket subprotocol begins with that carries a token in place of a header.
pub(crate) const TOKEN_PROTOCOL: &str = "base64url.bearer.authorization.k8s.io.";

/// Headers that are between two neighbours and not passed on (RFC 9110, 7.6.1), but for those of
/// an upgrade.
pub(super) const HOP_BY_HOP: [HeaderName; 6] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
];

/// The client's headers without its credentials, which are not the backend's to see.
pub(super) fn forwarded(headers: &HeaderMap, upgrade: bool) -> HeaderMap {
    let mut forwarded = headers.clone();
    for name in HOP_BY_HOP {
        forwarded.remove(name);
    }
    forwarded.remove(header::AUTHORIZATION);
    without_token_protocol(&mut forwarded);
    forwarded.remove(header::HOST);
    let impersonation: Vec<HeaderName> = forwarded
        .keys()
        .filter(|name| name.as_str().starts_with("impersonate-"))
        .cloned()
        .collect();
    for name in impersonation {
        forwarded.remove(name);
    }
    if upgrade {
        forwarded.insert(header::CONNECTION, http::HeaderValue::from_static("Upgrade"));
    } else {
        forwarded.remove(header::UPGRADE);
    }
    forwarded
}

/// Takes out the subprotocol by which browsers send a token.
fn without_token_protocol(headers: &mut HeaderMap) {
    let kept: Vec<String> = headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|protocol| !protocol.is_empty() && !protocol.starts_with(TOKEN_PROTOCOL))
        .map(str::to_owned)
        .collect();
    headers.remove(header::SEC_WEBSOCKET_PROTOCOL);
    if let Ok(kept) = kept.join(", ").parse::<http::HeaderValue>()
        && !kept.is_empty()
    {
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_stay_here() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer x"),
            ("impersonate-user", "x"),
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "v4.channel.k8s.io"),
        ] {
            headers.insert(name, value.parse().unwrap());
        }
        let out = forwarded(&headers, true);
        assert_eq!(out.get("connection").unwrap(), "Upgrade");
        assert_eq!(out.get("upgrade").unwrap(), "SPDY/3.1");
        assert!(out.contains_key("x-stream-protocol-version"));
        assert!(!out.contains_key("authorization") && !out.contains_key("impersonate-user"));
        assert!(!forwarded(&headers, false).contains_key("upgrade"));
    }

    #[test]
    fn a_token_among_the_subprotocols_stays_here() {
        let name = "sec-websocket-protocol";
        let mut headers = HeaderMap::new();
        let token = format!("{TOKEN_PROTOCOL}c2VjcmV0");
        headers.insert(name, format!("{token}, chat").parse().unwrap());
        headers.append(name, "v5.channel.k8s.io".parse().unwrap());
        let out = forwarded(&headers, true);
        assert_eq!(out.get(name).unwrap(), "chat, v5.channel.k8s.io");
        assert_eq!(out.get_all(name).iter().count(), 1);
        headers.insert(name, token.parse().unwrap());
        assert!(!forwarded(&headers, true).contains_key(name));
    }
}
