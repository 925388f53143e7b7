//! Which certificates there should be, and when one has to be issued again.

use std::{collections::BTreeSet, fmt, net::IpAddr, time::Duration};

use jiff::Timestamp;

use super::{PkiConfig, PkiError};

/// How long the certificate authority lasts (kubeadm's choice).
pub(crate) const AUTHORITY_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long all others last (kubeadm's choice).
pub(crate) const LEAF_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
/// Certificates are valid from a little earlier, since clients' clocks differ.
pub(crate) const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// A certificate that the cluster's authority signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Leaf {
    /// What the API server shows to clients.
    ApiServer,
    /// What the API server shows to kubelets.
    ApiServerKubeletClient,
    /// What the kubelet's HTTPS port shows to clients.
    KubeletServer,
    /// The node's identity towards the API server: `system:node:<name>`.
    KubeletClient,
    /// The administrator: `kubernetes-admin`, group `system:masters`.
    Admin,
    /// `system:kube-controller-manager`.
    ControllerManager,
    /// `system:kube-scheduler`.
    Scheduler,
    /// `system:kube-proxy`, to whom the `system:node-proxier` role is bound.
    KubeProxy,
}

impl Leaf {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::ApiServer,
        Self::ApiServerKubeletClient,
        Self::KubeletServer,
        Self::KubeletClient,
        Self::Admin,
        Self::ControllerManager,
        Self::Scheduler,
        Self::KubeProxy,
    ];

    /// The name of its two files without `.crt` and `.key`.
    #[must_use]
    pub const fn file(self) -> &'static str {
        match self {
            Self::ApiServer => "apiserver",
            Self::ApiServerKubeletClient => "apiserver-kubelet-client",
            Self::KubeletServer => "kubelet",
            Self::KubeletClient => "kubelet-client",
            Self::Admin => "admin",
            Self::ControllerManager => "controller-manager",
            Self::Scheduler => "scheduler",
            Self::KubeProxy => "kube-proxy",
        }
    }
}

/// What a certificate may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Usage {
    Server,
    Client,
}

/// A certificate as it should be.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) file: &'static str,
    pub(crate) common_name: String,
    pub(crate) organization: Option<String>,
    /// Subject alternative names; addresses in their canonical form.
    pub(crate) names: BTreeSet<String>,
    pub(crate) usage: Usage,
}

impl Wanted {
    /// A client certificate.
    pub(crate) fn client(name: &str, organization: Option<&str>) -> Self {
        Self {
            file: "client",
            common_name: name.to_owned(),
            organization: organization.map(str::to_owned),
            names: BTreeSet::new(),
            usage: Usage::Client,
        }
    }

    /// One of the cluster's own.
    pub(crate) fn of(leaf: Leaf, config: &PkiConfig) -> Result<Self, PkiError> {
        let node = format!("system:node:{}", config.node_name);
        let (name, organization) = match leaf {
            Leaf::ApiServer => ("kube-apiserver", None),
            Leaf::ApiServerKubeletClient => {
                ("kube-apiserver-kubelet-client", Some("system:masters"))
            }
            Leaf::KubeletServer | Leaf::KubeletClient => (node.as_str(), Some("system:nodes")),
            Leaf::Admin => ("kubernetes-admin", Some("system:masters")),
            Leaf::ControllerManager => ("system:kube-controller-manager", None),
            Leaf::Scheduler => ("system:kube-scheduler", None),
            Leaf::KubeProxy => ("system:kube-proxy", None),
        };
        let mut wanted = Self { file: leaf.file(), ..Self::client(name, organization) };
        match leaf {
            Leaf::ApiServer => {
                wanted.usage = Usage::Server;
                // "PKI certificates and requirements": the host name and address, the service
                // address, and the Service's names from the shortest to the longest.
                let mut names = own_names(config);
                names.extend(
                    ["kubernetes", "kubernetes.default", "kubernetes.default.svc"]
                        .map(str::to_owned),
                );
                names.push(format!("kubernetes.default.svc.{}", config.cluster_domain));
                names.push(config.service_ip.to_string());
                names.extend(config.extra_sans.iter().cloned());
                wanted.names = canonical(names)?;
            }
            Leaf::KubeletServer => {
                wanted.usage = Usage::Server;
                wanted.names = canonical(own_names(config))?;
            }
            _ => {}
        }
        Ok(wanted)
    }

    /// What the kubelet of another machine shows to the API server.
    pub(crate) fn kubelet_server(node: &str, addresses: &[IpAddr]) -> Result<Self, PkiError> {
        let mut names = vec![node.to_owned()];
        names.extend(addresses.iter().map(ToString::to_string));
        Ok(Self {
            names: canonical(names)?,
            usage: Usage::Server,
            ..Self::client(&format!("system:node:{node}"), Some("system:nodes"))
        })
    }
}

fn own_names(config: &PkiConfig) -> Vec<String> {
    let mut names =
        vec![config.node_name.clone(), "localhost".into(), "127.0.0.1".into(), "::1".into()];
    names.extend(config.advertise_addresses.iter().map(ToString::to_string));
    names
}

/// Addresses in one spelling, names in lower case; anything else is refused.
fn canonical(names: Vec<String>) -> Result<BTreeSet<String>, PkiError> {
    names
        .into_iter()
        .map(|name| match name.parse::<IpAddr>() {
            Ok(address) => Ok(address.to_string()),
            Err(_) if is_dns_name(&name) => Ok(name.to_ascii_lowercase()),
            Err(_) => Err(PkiError::BadName(name)),
        })
        .collect()
}

/// A DNS name as certificates may hold it; the first label may be `*`.
fn is_dns_name(name: &str) -> bool {
    let rest = name.strip_prefix("*.").unwrap_or(name);
    name.len() <= 253
        && rest.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        })
}

/// A certificate as it was found.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) common_name: String,
    pub(crate) organizations: Vec<String>,
    pub(crate) names: BTreeSet<String>,
    pub(crate) not_before: Timestamp,
    pub(crate) not_after: Timestamp,
    /// The cluster's present authority signed it.
    pub(crate) signed_by_authority: bool,
    /// The key beside it is its own.
    pub(crate) key_matches: bool,
}

/// Why a certificate is issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    Missing,
    KeyMismatch,
    OtherAuthority,
    SubjectChanged,
    NamesChanged,
    NotYetValid,
    NearExpiry,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "it or its key is missing",
            Self::KeyMismatch => "the key beside it is not its own",
            Self::OtherAuthority => "another authority signed it",
            Self::SubjectChanged => "it is for another subject",
            Self::NamesChanged => "its names or addresses are no longer the right ones",
            Self::NotYetValid => "it is not valid yet",
            Self::NearExpiry => "less than 30 % of its life remains",
        })
    }
}

/// Whether and why the certificate has to be issued.
pub(crate) fn reissue(seen: Option<&Seen>, wanted: &Wanted, now: Timestamp) -> Option<Reason> {
    let Some(seen) = seen else { return Some(Reason::Missing) };
    if !seen.key_matches {
        return Some(Reason::KeyMismatch);
    }
    if !seen.signed_by_authority {
        return Some(Reason::OtherAuthority);
    }
    if seen.common_name != wanted.common_name
        || seen.organizations.iter().ne(wanted.organization.iter())
    {
        return Some(Reason::SubjectChanged);
    }
    if seen.names != wanted.names {
        return Some(Reason::NamesChanged);
    }
    if now < seen.not_before {
        return Some(Reason::NotYetValid);
    }
    let life = seen.not_after.as_second().saturating_sub(seen.not_before.as_second());
    let left = seen.not_after.as_second().saturating_sub(now.as_second());
    (left.saturating_mul(10) < life.saturating_mul(3)).then_some(Reason::NearExpiry)
}
