//! Replacing one endpoint of a Service.

use std::time::Instant;

use anyhow::Context;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{Api, ResourceExt, api::PostParams};

use super::{Bench, load::metric, nft::Peer, objects::endpoint_address, packets};
use crate::{
    api::{self, milliseconds},
    inside::inside_async,
    statistics::Samples,
};

/// What changes took, in milliseconds.
#[derive(Debug, Default)]
pub(super) struct Changed {
    /// From the update's request to its answer.
    pub(super) answered: Samples,
    /// From that answer to the first packet at the new endpoint.
    pub(super) packet: Samples,
    /// From the event's arrival in the proxy to the kernel's commit: the mean of all.
    pub(super) commit: Samples,
    /// `nft` doing the same in its own table.
    pub(super) beside: Samples,
}

impl Bench {
    /// Replaces the second endpoint of so many Services, one after the other.
    pub(super) fn change(&self, changes: usize, peer: &Peer) -> anyhow::Result<Changed> {
        let services = self.services()?;
        let mut changed = Changed::default();
        let before = self.commits()?;
        peer.fill()?;
        inside_async(&self.netns, || async {
            let client = api::client(&self.data_dir).await?;
            let slices: Api<EndpointSlice> = Api::default_namespaced(client);
            for number in 0..changes {
                let service = &services[number * 7 % services.len()];
                let endpoint = 2 * self.count + number;
                let mut slice = slices.get(&service.slice.name_any()).await?;
                let endpoints = slice.endpoints.as_mut().context("a slice without endpoints")?;
                endpoints[1].addresses = vec![endpoint_address(endpoint).to_string()];
                let first =
                    packets::watch(&self.netns, service.address, endpoint_address(endpoint))?;
                let asked = Instant::now();
                slices.replace(&slice.name_any(), &PostParams::default(), &slice).await?;
                let answered = Instant::now();
                let seen = tokio::task::spawn_blocking(move || first.join()).await?;
                let seen = seen.map_err(|_| anyhow::anyhow!("connecting panicked"))??;
                changed.answered.add(milliseconds(asked, answered));
                changed.packet.add(milliseconds(answered, seen));
                changed.beside.add(peer.change(number % self.count, endpoint)?);
            }
            Ok(())
        })?;
        peer.remove()?;
        let after = self.commits()?;
        let count = after.1 - before.1;
        anyhow::ensure!(count > 0.0, "the proxy counted no commit");
        changed.commit.add((after.0 - before.0) / count * 1e3);
        Ok(changed)
    }

    /// The sum, in seconds, and the number of the proxy's commits.
    fn commits(&self) -> anyhow::Result<(f64, f64)> {
        let text = self.running.cluster.fetch("http://127.0.0.1:10249/metrics");
        let text = text.map_err(|error| anyhow::anyhow!("the proxy's metrics: {error}"))?;
        let name = "keelson_proxy_event_to_commit_seconds";
        let value = |suffix: &str| {
            metric(&text, &format!("{name}_{suffix}"))
                .with_context(|| format!("no {name}_{suffix}"))
        };
        Ok((value("sum")?, value("count")?))
    }
}
