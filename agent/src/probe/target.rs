//! Where a probe or hook goes: ports by number or name, URLs.

use std::net::IpAddr;

use k8s_openapi::{
    api::core::v1::{Container, HTTPGetAction},
    apimachinery::pkg::util::intstr::IntOrString,
};

/// An HTTP request to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HttpTarget {
    /// With TLS, whose certificate is not verified.
    pub(crate) tls: bool,
    /// Host name or address.
    pub(crate) host: String,
    /// Port.
    pub(crate) port: u16,
    /// Path and query.
    pub(crate) path: String,
    /// Headers, as given.
    pub(crate) headers: Vec<(String, String)>,
}

impl HttpTarget {
    /// `host:port`, an IPv6 address in brackets.
    pub(crate) fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// The whole URL.
    pub(crate) fn url(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}{}", self.authority(), self.path)
    }
}

/// The port's number, looked up by name among the container's ports if it is a name.
pub(crate) fn port(port: &IntOrString, container: &Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            let named =
                container.ports.iter().flatten().find(|port| port.name.as_ref() == Some(name));
            match named {
                Some(port) => port.container_port,
                // a number in quotes is taken as a number
                None => name.parse().map_err(|_| {
                    format!("container {:?} has no port named {name:?}", container.name)
                })?,
            }
        }
    };
    u16::try_from(number)
        .ok()
        .filter(|number| *number > 0)
        .ok_or_else(|| format!("invalid port number: {number}"))
}

/// What an `httpGet` asks for.
pub(crate) fn http_target(
    get: &HTTPGetAction,
    container: &Container,
    address: IpAddr,
) -> Result<HttpTarget, String> {
    let path = get.path.as_deref().unwrap_or("/");
    Ok(HttpTarget {
        tls: get.scheme.as_deref().is_some_and(|scheme| scheme.eq_ignore_ascii_case("https")),
        host: get
            .host
            .clone()
            .filter(|host| !host.is_empty())
            .unwrap_or_else(|| address.to_string()),
        port: port(&get.port, container)?,
        path: if path.starts_with('/') { path.to_owned() } else { format!("/{path}") },
        headers: get
            .http_headers
            .iter()
            .flatten()
            .map(|header| (header.name.clone(), header.value.clone()))
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ContainerPort;

    use super::*;

    #[test]
    fn ports_are_numbers_or_names_of_the_container() {
        let container = Container {
            name: "c".to_owned(),
            ports: Some(vec![ContainerPort {
                name: Some("web".to_owned()),
                container_port: 8080,
                ..Default::default()
            }]),
            ..Default::default()
        };
        let rows = [
            (IntOrString::Int(80), Ok(80)),
            (IntOrString::String("web".to_owned()), Ok(8080)),
            (IntOrString::String("81".to_owned()), Ok(81)),
            (IntOrString::String("no".to_owned()), Err(())),
            (IntOrString::Int(0), Err(())),
            (IntOrString::Int(70000), Err(())),
        ];
        for (given, expected) in rows {
            assert_eq!(port(&given, &container).map_err(|_| ()), expected, "{given:?}");
        }
    }
}
