//! What a URL asks for.
//!
//! The paths are those of the kubelet, as the API server and operators use them
//! (`/containerLogs/{namespace}/{pod}/{container}`, `/exec/…`, `/attach/…`, `/portForward/…`).

use std::borrow::Cow;

/// A pod as named in a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PodPath {
    pub(super) namespace: String,
    pub(super) name: String,
    /// Given in the longer form of the paths.
    pub(super) uid: Option<String>,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// `/healthz`, `/healthz/…`, `/livez`, `/readyz`.
    Health,
    /// `/pods`: all pods with their status.
    Pods,
    /// `/runningpods/`: pods that have running containers.
    RunningPods,
    /// `/metrics`.
    Metrics,
    /// `/metrics/resource`.
    ResourceMetrics,
    /// `/metrics/probes`.
    ProbeMetrics,
    /// `/metrics/cadvisor`.
    ContainerMetrics,
    /// `/stats/summary`.
    Summary,
    /// `/configz`.
    Config,
    /// `/containerLogs/{namespace}/{pod}/{container}`.
    Logs(PodPath, String),
    /// `/exec/{namespace}/{pod}[/{uid}]/{container}`.
    Exec(PodPath, String),
    /// `/attach/…`, likewise.
    Attach(PodPath, String),
    /// `/portForward/{namespace}/{pod}[/{uid}]`.
    PortForward(PodPath),
}

impl Target {
    /// Reads a path; none if nothing is there.
    pub(super) fn parse(path: &str) -> Option<Self> {
        let parts: Vec<Cow<'_, str>> =
            path.split('/').filter(|part| !part.is_empty()).map(decode).collect::<Option<_>>()?;
        let parts: Vec<&str> = parts.iter().map(AsRef::as_ref).collect();
        let pod = |namespace: &str, name: &str, uid: Option<&str>| PodPath {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: uid.map(str::to_owned),
        };
        Some(match parts.as_slice() {
            ["healthz", ..] | ["livez" | "readyz"] => Self::Health,
            ["pods"] => Self::Pods,
            ["runningpods"] => Self::RunningPods,
            ["metrics"] => Self::Metrics,
            ["metrics", "resource"] => Self::ResourceMetrics,
            ["metrics", "probes"] => Self::ProbeMetrics,
            ["metrics", "cadvisor"] => Self::ContainerMetrics,
            ["stats", "summary"] => Self::Summary,
            ["configz"] => Self::Config,
            ["containerLogs", namespace, name, container] => {
                Self::Logs(pod(namespace, name, None), (*container).to_owned())
            }
            [kind @ ("exec" | "attach"), namespace, name, rest @ ..] => {
                let (uid, container) = match rest {
                    [container] => (None, container),
                    [uid, container] => (Some(*uid), container),
                    _ => return None,
                };
                let (pod, container) = (pod(namespace, name, uid), (*container).to_owned());
                if *kind == "exec" {
                    Self::Exec(pod, container)
                } else {
                    Self::Attach(pod, container)
                }
            }
            ["portForward", namespace, name] => Self::PortForward(pod(namespace, name, None)),
            ["portForward", namespace, name, uid] => {
                Self::PortForward(pod(namespace, name, Some(uid)))
            }
            _ => return None,
        })
    }

    /// The subresources of `nodes` that an authorizer is asked about, one after the other until one
    /// is allowed (Kubernetes' page "Kubelet authentication/authorization": fine-grained ones come
    /// before `proxy`).
    pub(super) fn subresources(&self) -> &'static [&'static str] {
        match self {
            Self::Metrics | Self::ResourceMetrics | Self::ProbeMetrics | Self::ContainerMetrics => {
                &["metrics"]
            }
            Self::Summary => &["stats"],
            Self::Health => &["healthz", "proxy"],
            Self::Pods | Self::RunningPods => &["pods", "proxy"],
            Self::Config => &["configz", "proxy"],
            Self::Logs(..) | Self::Exec(..) | Self::Attach(..) | Self::PortForward(..) => {
                &["proxy"]
            }
        }
    }
}

/// A path's part with its `%xx` read.
fn decode(part: &str) -> Option<Cow<'_, str>> {
    if !part.contains('%') {
        return Some(Cow::Borrowed(part));
    }
    percent_decoded(part).map(Cow::Owned)
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        if *byte == b'%' {
            let (digits, tail) = rest.split_first_chunk::<2>()?;
            let digit = |b: u8| (b as char).to_digit(16);
            bytes.push((digit(digits[0])? * 16 + digit(digits[1])?) as u8);
            rest = tail;
        } else {
            bytes.push(*byte);
        }
    }
    String::from_utf8(bytes).ok()
}

/// The query's pairs, in order.
pub(super) fn query(query: Option<&str>) -> Vec<(String, String)> {
    query
        .unwrap_or_default()
        .split('&')
        .filter(|pair| !pair.is_empty())
        .filter_map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Some((
                percent_decoded(&name.replace('+', " "))?,
                percent_decoded(&value.replace('+', " "))?,
            ))
        })
        .collect()
}

/// Whether one of `names` is set to `1` or `true`.
pub(super) fn is_set(query: &[(String, String)], names: &[&str]) -> bool {
    query.iter().any(|(name, value)| {
        names.contains(&name.as_str()) && matches!(value.as_str(), "1" | "true")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_the_kubelets() {
        let pod = |uid: Option<&str>| PodPath {
            namespace: "ns".into(),
            name: "p".into(),
            uid: uid.map(str::to_owned),
        };
        for (path, target) in [
            ("/healthz", Some(Target::Health)),
            ("/healthz/ping", Some(Target::Health)),
            ("/pods", Some(Target::Pods)),
            ("/runningpods/", Some(Target::RunningPods)),
            ("/stats/summary", Some(Target::Summary)),
            ("/containerLogs/ns/p/c", Some(Target::Logs(pod(None), "c".into()))),
            ("/exec/ns/p/c", Some(Target::Exec(pod(None), "c".into()))),
            ("/exec/ns/p/u/c", Some(Target::Exec(pod(Some("u")), "c".into()))),
            ("/attach/ns/p%2e/c", None),
            ("/portForward/ns/p", Some(Target::PortForward(pod(None)))),
            ("/exec/ns/p", None),
            ("/nothing", None),
        ] {
            if path.contains('%') {
                assert!(Target::parse(path).is_some(), "{path}");
                continue;
            }
            assert_eq!(Target::parse(path), target, "{path}");
        }
    }

    #[test]
    fn who_may_all_of_a_node_may_each_part() {
        for path in ["/pods", "/runningpods/", "/healthz", "/configz", "/exec/ns/p/c"] {
            let subresources = Target::parse(path).unwrap().subresources();
            assert_eq!(subresources.last(), Some(&"proxy"), "{path}");
        }
        assert_eq!(Target::Metrics.subresources(), ["metrics"]);
    }

    #[test]
    fn queries_are_read() {
        let pairs = query(Some("command=a+b&command=%26&tty=1&x"));
        assert_eq!(pairs[0], ("command".into(), "a b".into()));
        assert_eq!(pairs[1], ("command".into(), "&".into()));
        assert!(is_set(&pairs, &["tty"]));
        assert!(!is_set(&pairs, &["x"]));
    }
}
