//! The Services and EndpointSlices that are made.

use std::{net::Ipv4Addr, ops::Range};

use anyhow::Context;
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::{Api, Client, api::PostParams};
use serde_json::json;

/// The label of everything made here.
pub(super) const LABEL: &str = "bench=service";
/// A Service that was made.
#[derive(Clone, Debug)]
pub(super) struct Made {
    /// Its address.
    pub(super) address: Ipv4Addr,
    /// Its first slice, as the API answered.
    pub(super) slice: EndpointSlice,
    /// Whether that slice has all its endpoints.
    pub(super) is_whole: bool,
}

/// The address of an endpoint: all lie in 10.200.0.0/16, the first 256 are left out.
pub(super) fn endpoint_address(number: usize) -> Ipv4Addr {
    let base = u32::from(Ipv4Addr::new(10, 200, 1, 0));
    Ipv4Addr::from(base + u32::try_from(number % 65_000).unwrap_or_default())
}

/// The most endpoints in one slice, as the API has it.
const SLICE: usize = 1_000;

/// Makes a Service without a selector, after its slices of so many endpoints.
async fn make(client: &Client, number: usize, endpoints: usize) -> anyhow::Result<Made> {
    let name = format!("service-{number}");
    let labels = json!({"bench": "service", "kubernetes.io/service-name": name});
    let endpoint = |number: usize| {
        json!({
            "addresses": [endpoint_address(number)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": "elsewhere",
        })
    };
    let slices: Api<EndpointSlice> = Api::default_namespaced(client.clone());
    let mut first = None;
    for part in 0..endpoints.div_ceil(SLICE) {
        let numbers = part * SLICE..endpoints.min((part + 1) * SLICE);
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": {
                "name": if part == 0 { name.clone() } else { format!("{name}-{part}") },
                "labels": labels,
            },
            "addressType": "IPv4",
            "ports": [{"name": "", "port": super::packets::PORT, "protocol": "TCP"}],
            "endpoints": numbers.map(|n| endpoint(endpoints * number + n)).collect::<Vec<_>>(),
        }))?;
        let made = slices.create(&PostParams::default(), &slice).await?;
        first.get_or_insert(made);
    }
    let slice = first.context("a Service without endpoints")?;
    let service: Service = serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {"bench": "service"}},
        "spec": {"ports": [{"port": 80, "targetPort": super::packets::PORT, "protocol": "TCP"}]},
    }))?;
    let services: Api<Service> = Api::default_namespaced(client.clone());
    let service = services.create(&PostParams::default(), &service).await?;
    let address = service.spec.and_then(|spec| spec.cluster_ip).context("no cluster address")?;
    Ok(Made { address: address.parse().context(address)?, slice, is_whole: endpoints <= SLICE })
}

/// Makes those with these numbers, so many requests at a time, and returns them in the order in
/// which their creation was answered.
pub(super) async fn make_all(
    client: &Client,
    numbers: Range<usize>,
    endpoints: usize,
    at_once: usize,
) -> anyhow::Result<Vec<Made>> {
    stream::iter(numbers)
        .map(|number| make(client, number, endpoints))
        .buffer_unordered(at_once)
        .try_collect()
        .await
}
