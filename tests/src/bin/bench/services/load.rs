//! Loading all Services: when they are made, and when the process starts again.

use std::time::Instant;

use anyhow::{Context, bail};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use keelson_tests::wait_for;
use kube::{Api, ResourceExt, api::ListParams};

use super::{
    Bench, nft,
    objects::{self, LABEL, Made},
    reachable,
};
use crate::{
    api::{self, DEADLINE, milliseconds},
    inside::inside_async,
    statistics::Samples,
};

/// How many requests are under way at once.
const AT_ONCE: usize = 8;

/// One load.
#[derive(Debug)]
pub(super) struct Load {
    /// From the first request to the last answer, in milliseconds.
    pub(super) creating: f64,
    /// From the last answer until every Service answered, in milliseconds.
    pub(super) reachable: f64,
}

/// What starts of the process took, in milliseconds.
#[derive(Debug, Default)]
pub(super) struct Restarts {
    /// All syncs of the proxy until the last Service was reachable.
    pub(super) synced: Samples,
    /// Until the API answered.
    pub(super) answered: Samples,
    /// Until the last Service was reachable.
    pub(super) reachable: Samples,
}

impl Bench {
    /// Makes all Services and waits until they answer.
    pub(super) fn load(&self) -> anyhow::Result<Load> {
        let (count, data_dir) = (self.count, &self.data_dir);
        let (made, asked, answered) = inside_async(&self.netns, || async {
            let client = api::client(data_dir).await?;
            let asked = Instant::now();
            let made = objects::make_all(&client, 0..count, 2, AT_ONCE).await?;
            Ok((made, asked, Instant::now()))
        })?;
        // The answers of the last requests may have overtaken each other.
        let late = made.len().saturating_sub(16);
        let last = reachable(&self.netns, &made[late..])?;
        reachable(&self.netns, &made[..late])?;
        let found = nft::elements(&self.netns)?;
        if found < 3 * count {
            bail!("{count} Services answer, but the kernel has {found} elements");
        }
        Ok(Load {
            creating: milliseconds(asked, answered),
            reachable: milliseconds(answered, last),
        })
    }

    /// Removes all Services and waits until the kernel has forgotten them.
    pub(super) fn remove_all(&self) -> anyhow::Result<()> {
        inside_async(&self.netns, || async {
            let client = api::client(&self.data_dir).await?;
            api::remove_all(&Api::<Service>::default_namespaced(client.clone()), LABEL).await?;
            api::remove_all(&Api::<EndpointSlice>::default_namespaced(client), LABEL).await
        })?;
        wait_for("the kernel to forget the Services", DEADLINE, || {
            let found = nft::elements(&self.netns).map_err(|error| error.to_string())?;
            if found < self.count { Ok(()) } else { Err(format!("{found} elements")) }
        });
        Ok(())
    }

    /// Kills the process and starts it again, without any rule in the kernel if it is to be a cold
    /// start.
    pub(super) fn restart(&mut self, cold: bool, restarts: &mut Restarts) -> anyhow::Result<()> {
        let services = self.services()?;
        let cluster = &mut self.running.cluster;
        cluster.kill_process();
        if cold {
            nft::flush(&self.netns)?;
        }
        let started = Instant::now();
        cluster.start_process();
        let pid = cluster.pid();
        let (netns, data_dir) = (&self.netns, &self.data_dir);
        let (answered, last) = std::thread::scope(|scope| {
            let answered = scope.spawn(|| {
                inside_async(netns, || async { Ok(api::answering(data_dir, pid).await?.1) })
            });
            let last = reachable(netns, &services);
            (answered.join(), last)
        });
        let answered = answered.map_err(|_| anyhow::anyhow!("asking the API panicked"))??;
        let last = last?;
        if cold {
            restarts.reachable.add(milliseconds(started, last));
            restarts.answered.add(milliseconds(started, answered));
        }
        restarts.synced.add(self.synced()?);
        Ok(())
    }

    /// All Services as they are stored.
    pub(super) fn services(&self) -> anyhow::Result<Vec<Made>> {
        inside_async(&self.netns, || async {
            let client = api::client(&self.data_dir).await?;
            let services: Api<Service> = Api::default_namespaced(client.clone());
            let slices: Api<EndpointSlice> = Api::default_namespaced(client);
            let list = services.list(&ListParams::default().labels(LABEL)).await?;
            stream::iter(list.items)
                .map(|service| async {
                    let slice = slices.get(&service.name_any()).await?;
                    let address = service.spec.and_then(|spec| spec.cluster_ip);
                    let address = address.context("a Service without an address")?.parse()?;
                    anyhow::Ok(Made { address, slice, is_whole: true })
                })
                .buffered(8)
                .try_collect()
                .await
        })
    }

    /// How long the proxy's syncs took since it was started, in milliseconds, once it has made one.
    fn synced(&self) -> anyhow::Result<f64> {
        let syncs = wait_for("the proxy's metrics", DEADLINE, || {
            let text = self.running.cluster.fetch("http://127.0.0.1:10249/metrics")?;
            let name = "kubeproxy_sync_proxy_rules_duration_seconds";
            let count = metric(&text, &format!("{name}_count")).unwrap_or_default();
            if count > 0.0 {
                metric(&text, &format!("{name}_sum")).ok_or_else(|| "no sum".to_owned())
            } else {
                Err("no sync yet".to_owned())
            }
        });
        Ok(syncs * 1e3)
    }
}

/// The sum of a metric over all of its labels.
pub(super) fn metric(text: &str, name: &str) -> Option<f64> {
    let values: Vec<f64> = text
        .lines()
        .filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let of_this_name = rest.starts_with('{') || rest.starts_with(' ');
            of_this_name.then(|| rest.rsplit(' ').next()?.parse().ok())?
        })
        .collect();
    (!values.is_empty()).then(|| values.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_summed_over_its_labels() {
        let text = "# HELP a_sum x\na_sum{f=\"4\"} 1.5\na_sum{f=\"6\"} 0.5\na_sum_b 9\na 3\n";
        assert_eq!(metric(text, "a_sum"), Some(2.0));
        assert_eq!(metric(text, "a"), Some(3.0));
        assert_eq!(metric(text, "b"), None);
    }
}
