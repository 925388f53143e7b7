//! The Services and EndpointSlices that are made.

use std::net::Ipv4Addr;

use anyhow::Context;
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::{Api, Client, api::PostParams};
use serde_json::json;

/// The label of everything made here.
pub(super) const LABEL: &str = "bench=service";
/// How many requests are under way at once.
const AT_ONCE: usize = 8;

/// A Service that was made.
#[derive(Clone, Debug)]
pub(super) struct Made {
    /// Its address.
    pub(super) address: Ipv4Addr,
    /// Its only slice, as the API answered.
    pub(super) slice: EndpointSlice,
}

/// The address of an endpoint: all lie in 10.200.0.0/16, the first 256 are left out.
pub(super) fn endpoint_address(number: usize) -> Ipv4Addr {
    let base = u32::from(Ipv4Addr::new(10, 200, 1, 0));
    Ipv4Addr::from(base + u32::try_from(number % 65_000).unwrap_or_default())
}

/// Makes a Service without a selector, after its slice of two endpoints.
async fn make(client: &Client, number: usize) -> anyhow::Result<Made> {
    let name = format!("service-{number}");
    let labels = json!({"bench": "service", "kubernetes.io/service-name": name});
    let endpoint = |number: usize| {
        json!({
            "addresses": [endpoint_address(number)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": "elsewhere",
        })
    };
    let slice: EndpointSlice = serde_json::from_value(json!({
        "metadata": {"name": name, "labels": labels},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": super::packets::PORT, "protocol": "TCP"}],
        "endpoints": [endpoint(2 * number), endpoint(2 * number + 1)],
    }))?;
    let service: Service = serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {"bench": "service"}},
        "spec": {"ports": [{"port": 80, "targetPort": super::packets::PORT, "protocol": "TCP"}]},
    }))?;
    let slices: Api<EndpointSlice> = Api::default_namespaced(client.clone());
    let services: Api<Service> = Api::default_namespaced(client.clone());
    let slice = slices.create(&PostParams::default(), &slice).await?;
    let service = services.create(&PostParams::default(), &service).await?;
    let address = service.spec.and_then(|spec| spec.cluster_ip).context("no cluster address")?;
    Ok(Made { address: address.parse().context(address)?, slice })
}

/// Makes so many, and returns them in the order in which their creation was answered.
pub(super) async fn make_all(client: &Client, count: usize) -> anyhow::Result<Vec<Made>> {
    stream::iter(0..count)
        .map(|number| make(client, number))
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}
