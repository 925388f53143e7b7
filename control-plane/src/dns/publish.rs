//! Makes this DNS server the cluster's: the Service `kube-system/kube-dns` and the EndpointSlice
//! behind it, which lead to the address that the server listens on.
//!
//! A Service of that name with a selector is somebody's own DNS: it is left alone.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use k8s_openapi::{
    api::{
        core::v1::{Service, ServicePort, ServiceSpec},
        discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use keelson_api::object::{ObjectKey, controller_reference};
use kube::{Api, Client, api::PostParams};
use tokio_util::sync::CancellationToken;

use crate::{
    controllers::{
        change::{self, Part},
        error::{ControllerError, Doing, code},
        queue::WorkQueue,
    },
    informers::Informers,
};

const NAMESPACE: &str = "kube-system";
const NAME: &str = "kube-dns";
const PORT: u16 = 53;
const MANAGER: &str = "dns.keelson";
/// When to try again while the namespace is not there yet.
const NOT_YET: Duration = Duration::from_millis(200);

/// Where cluster DNS is to be found.
#[derive(Clone, Debug)]
pub struct Published {
    /// The Service's address (`10.96.0.10`).
    pub service_address: std::net::IpAddr,
    /// Where the server listens; an address that pods can reach, so not a loopback one.
    pub endpoint: SocketAddr,
    /// The node that it runs on.
    pub node_name: String,
}

/// Makes and keeps Service and EndpointSlice until `shutdown`.
///
/// The client's user must be one that may write Services and EndpointSlices in `kube-system`.
pub async fn publish(
    client: Client,
    informers: Arc<Informers>,
    published: Published,
    shutdown: CancellationToken,
) {
    if !(informers.services.synced(&shutdown).await
        && informers.endpoint_slices.synced(&shutdown).await)
    {
        return;
    }
    let queue = WorkQueue::new();
    let key = ObjectKey::new(NAMESPACE, NAME);
    queue.add(key.clone());
    let (add, ours) = (queue.clone(), key.clone());
    informers.services.on_change(move |change| {
        if change.key() == ours {
            add.add(ours.clone());
        }
    });
    let (add, ours) = (queue.clone(), key);
    informers.endpoint_slices.on_change(move |change| {
        if change.key() == ours {
            add.add(ours.clone());
        }
    });
    let work = |key| {
        let (client, informers, published) = (client.clone(), informers.clone(), published.clone());
        async move { ensure(&client, &informers, &published, &key).await }
    };
    queue.run("dns", 1, shutdown, work).await;
}

async fn ensure(
    client: &Client,
    informers: &Informers,
    published: &Published,
    key: &ObjectKey,
) -> Result<Option<Duration>, ControllerError> {
    let services: Api<Service> = Api::namespaced(client.clone(), NAMESPACE);
    let known = match informers.services.get(key) {
        // The informer may not have heard yet of what the pass before made.
        None => there(&services).await.doing(|| format!("look up service {key}"))?,
        known => known,
    };
    let service = match &known {
        Some(service) if has_selector(service) => return Ok(None),
        Some(service) => {
            let wanted = wanted_service(published, Some(service));
            change::write(&services, &**service, &wanted, Part::Main)
                .await?
                .unwrap_or_else(|| (**service).clone())
        }
        None => {
            let wanted = wanted_service(published, None);
            match services.create(&PostParams::default(), &wanted).await {
                Ok(created) => created,
                // The namespace is not there yet.
                Err(error) if code(&error) == 404 => return Ok(Some(NOT_YET)),
                Err(error) => return Err(error).doing(|| format!("create service {key}")),
            }
        }
    };
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), NAMESPACE);
    let known = match informers.endpoint_slices.get(key) {
        None => there(&slices).await.doing(|| format!("look up endpointslice {key}"))?,
        known => known,
    };
    let wanted = wanted_slice(published, &service, known.as_deref());
    match known {
        Some(known) => {
            change::write(&slices, &*known, &wanted, Part::Main).await?;
        }
        None => {
            let created = slices.create(&PostParams::default(), &wanted).await;
            created.doing(|| format!("create endpointslice {key}"))?;
        }
    }
    Ok(None)
}

/// The object at the API server.
async fn there<K>(api: &Api<K>) -> Result<Option<Arc<K>>, kube::Error>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    Ok(api.get_opt(NAME).await?.map(Arc::new))
}

fn has_selector(service: &Service) -> bool {
    let selector = service.spec.as_ref().and_then(|s| s.selector.as_ref());
    selector.is_some_and(|selector| !selector.is_empty())
}

fn metadata() -> ObjectMeta {
    ObjectMeta {
        namespace: Some(NAMESPACE.to_owned()),
        name: Some(NAME.to_owned()),
        ..ObjectMeta::default()
    }
}

/// The two ports: their names and protocols.
const PORTS: [(&str, &str); 2] = [("dns", "UDP"), ("dns-tcp", "TCP")];

fn wanted_service(published: &Published, known: Option<&Service>) -> Service {
    let mut service =
        known.cloned().unwrap_or_else(|| Service { metadata: metadata(), ..Service::default() });
    let labels = service.metadata.labels.get_or_insert_default();
    for (key, value) in [
        ("k8s-app", "kube-dns"),
        ("kubernetes.io/cluster-service", "true"),
        ("kubernetes.io/name", "CoreDNS"),
    ] {
        labels.insert(key.to_owned(), value.to_owned());
    }
    let spec = service.spec.get_or_insert_with(ServiceSpec::default);
    if spec.cluster_ip.is_none() {
        spec.cluster_ip = Some(published.service_address.to_string());
    }
    let target = IntOrString::Int(published.endpoint.port().into());
    let is_right = spec.ports.as_ref().is_some_and(|ports| {
        ports.len() == PORTS.len()
            && PORTS.iter().all(|(name, protocol)| {
                ports.iter().any(|port| {
                    port.name.as_deref() == Some(name)
                        && port.protocol.as_deref() == Some(protocol)
                        && port.port == i32::from(PORT)
                        && port.target_port.as_ref() == Some(&target)
                })
            })
    });
    if !is_right {
        let port = |(name, protocol): &(&str, &str)| ServicePort {
            name: Some((*name).to_owned()),
            protocol: Some((*protocol).to_owned()),
            port: PORT.into(),
            target_port: Some(target.clone()),
            ..ServicePort::default()
        };
        spec.ports = Some(PORTS.iter().map(port).collect());
    }
    service
}

fn wanted_slice(
    published: &Published,
    service: &Service,
    known: Option<&EndpointSlice>,
) -> EndpointSlice {
    let mut slice = known.cloned().unwrap_or_else(|| EndpointSlice {
        metadata: metadata(),
        address_type: if published.endpoint.is_ipv4() { "IPv4" } else { "IPv6" }.to_owned(),
        ..EndpointSlice::default()
    });
    slice.metadata.labels = Some(BTreeMap::from([
        ("k8s-app".to_owned(), "kube-dns".to_owned()),
        ("kubernetes.io/service-name".to_owned(), NAME.to_owned()),
        ("endpointslice.kubernetes.io/managed-by".to_owned(), MANAGER.to_owned()),
    ]));
    slice.metadata.owner_references =
        Some(vec![controller_reference::<Service>(&service.metadata)]);
    slice.ports = Some(
        PORTS
            .iter()
            .map(|(name, protocol)| EndpointPort {
                name: Some((*name).to_owned()),
                protocol: Some((*protocol).to_owned()),
                port: Some(published.endpoint.port().into()),
                app_protocol: None,
            })
            .collect(),
    );
    slice.endpoints = Some(vec![Endpoint {
        addresses: vec![published.endpoint.ip().to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(true),
            serving: Some(true),
            terminating: Some(false),
        }),
        node_name: Some(published.node_name.clone()),
        ..Endpoint::default()
    }]);
    slice
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_right_is_not_written_again() {
        let published = Published {
            service_address: "10.96.0.10".parse().unwrap(),
            endpoint: "192.0.2.1:1053".parse().unwrap(),
            node_name: "n1".into(),
        };
        let service = wanted_service(&published, None);
        assert_eq!(wanted_service(&published, Some(&service)), service);
        let slice = wanted_slice(&published, &service, None);
        assert_eq!(wanted_slice(&published, &service, Some(&slice)), slice);
        assert_eq!(slice.ports.unwrap()[0].port, Some(1053));
    }
}
