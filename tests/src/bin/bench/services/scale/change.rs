//! Replacing single endpoints, alone and while others are being replaced.

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::json;

use super::{
    Scene,
    contestant::{Account, Proxy},
};
use crate::{
    api::{self, milliseconds},
    inside::inside_async,
    services::{
        objects::{self, Made, endpoint_address},
        packets,
    },
    statistics::Samples,
};

/// Endpoints changed for one figure.
const CHANGES: usize = 30;
/// How many others change each second.
const OTHERS: usize = 100;
/// Requests for others that may be under way at once.
const AT_ONCE: usize = 8;
/// Between two changes, so that they are spread over the others.
const APART: Duration = Duration::from_millis(100);

/// What changes took, in milliseconds.
#[derive(Debug, Default)]
pub(super) struct Changed {
    /// From the API's answer to the first packet at the new endpoint.
    pub(super) packet: Samples,
    /// By the proxy's own account.
    pub(super) commit: Samples,
    /// How many others changed each second.
    pub(super) others: Samples,
}

/// Addresses of endpoints, each another one, and none that the first Services have.
#[derive(Debug)]
pub(super) struct Fresh(AtomicUsize);

impl Fresh {
    /// Past those of 30,000 Services of two.
    pub(super) fn new() -> Self {
        Self(AtomicUsize::new(60_000))
    }

    fn next(&self) -> String {
        endpoint_address(self.0.fetch_add(1, Ordering::Relaxed)).to_string()
    }

    /// Addresses far from those that this one gives next.
    fn far(&self) -> Self {
        Self(AtomicUsize::new(self.0.load(Ordering::Relaxed) + 30_000))
    }
}

/// Leaves two endpoints to the Services whose endpoints will be changed: a connection finds the new
/// one at the second try then. Nobody is measured with that.
pub(super) fn prepare(scene: &mut Scene) -> anyhow::Result<()> {
    let chosen: Vec<usize> = (0..CHANGES).map(|number| number * 7 % scene.made.len()).collect();
    let (data_dir, netns) = (scene.running.data_dir(), scene.running.cluster.machine.netns());
    let made = &mut scene.made;
    inside_async(&netns, || async {
        let slices: Api<EndpointSlice> = Api::default_namespaced(api::client(&data_dir).await?);
        for index in chosen {
            let slice = &mut made[index].slice;
            if slice.endpoints.as_ref().is_some_and(|endpoints| endpoints.len() > 2) {
                let endpoints = slice.endpoints.as_mut().context("a slice without endpoints")?;
                endpoints.truncate(2);
                replace(&slices, slice).await?;
            }
        }
        Ok(())
    })
}

/// Replaces the first endpoint of Services, one after the other; `among_others` while a hundred
/// others are replaced each second.
pub(super) fn change(
    scene: &Scene,
    proxy: &mut Proxy,
    among_others: bool,
) -> anyhow::Result<Changed> {
    let mut changed = Changed::default();
    let others = among_others.then(|| Others::of(scene)).transpose()?;
    let before = Account::at_rest(&scene.running, proxy)?;
    if let Some(others) = others {
        let stop = AtomicBool::new(false);
        let far = scene.fresh.far();
        let rate = thread::scope(|scope| {
            let others = &others;
            let stop = &stop;
            let thread = scope.spawn(move || others.change_until(scene, stop, &far));
            let result = one_by_one(scene, &mut changed, APART);
            stop.store(true, Ordering::Relaxed);
            let rate = thread.join().map_err(|_| anyhow::anyhow!("changing others panicked"))??;
            result.map(|()| rate)
        })?;
        changed.others.add(rate);
        let after = Account::at_rest(&scene.running, proxy)?;
        after.commit_since(&before).into_iter().for_each(|ms| changed.commit.add(ms));
        others.remove(scene)?;
    } else {
        one_by_one(scene, &mut changed, Duration::ZERO)?;
        let after = Account::at_rest(&scene.running, proxy)?;
        after.commit_since(&before).into_iter().for_each(|ms| changed.commit.add(ms));
    }
    Ok(changed)
}

fn one_by_one(scene: &Scene, changed: &mut Changed, apart: Duration) -> anyhow::Result<()> {
    let machine = &scene.running.cluster.machine;
    let data_dir = scene.running.data_dir();
    inside_async(&machine.netns(), || async {
        let slices: Api<EndpointSlice> = Api::default_namespaced(api::client(&data_dir).await?);
        for number in 0..CHANGES {
            let service = &scene.made[number * 7 % scene.made.len()];
            let mut slice = service.slice.clone();
            let endpoints = slice.endpoints.as_mut().context("a slice without endpoints")?;
            let address = scene.fresh.next();
            endpoints[0].addresses = vec![address.clone()];
            if service.is_whole {
                let address = address.parse()?;
                let first = packets::watch(&machine.neighbour_netns(), service.address, address)?;
                replace(&slices, &slice).await?;
                let answered = Instant::now();
                let seen = tokio::task::spawn_blocking(move || first.join()).await?;
                let seen = seen.map_err(|_| anyhow::anyhow!("connecting panicked"))??;
                changed.packet.add(milliseconds(answered, seen));
            } else {
                // With thousands of endpoints a connection finds the new one by luck only.
                replace(&slices, &slice).await?;
            }
            tokio::time::sleep(apart).await;
        }
        Ok(())
    })
}

/// Replaces a slice's endpoints, whatever was changed since.
async fn replace(slices: &Api<EndpointSlice>, slice: &EndpointSlice) -> anyhow::Result<()> {
    let patch = Patch::Merge(json!({"endpoints": slice.endpoints}));
    slices.patch(&slice.name_any(), &PatchParams::default(), &patch).await?;
    Ok(())
}

/// Services that change besides those that are measured.
struct Others {
    made: Vec<Made>,
    /// Whether they were made for this alone.
    own: bool,
}

impl Others {
    fn of(scene: &Scene) -> anyhow::Result<Self> {
        let all = &scene.made;
        if all.len() > 8 * OTHERS {
            // The first ones are those that are measured.
            return Ok(Self { made: all[all.len() - OTHERS..].to_vec(), own: false });
        }
        let made = inside_async(&scene.running.cluster.machine.netns(), || async {
            let client = api::client(&scene.running.data_dir()).await?;
            objects::make_all(&client, all.len()..all.len() + OTHERS, 2, OTHERS).await
        })?;
        Ok(Self { made, own: true })
    }

    /// Changes one after the other until `stop`; how many a second that were.
    fn change_until(&self, scene: &Scene, stop: &AtomicBool, fresh: &Fresh) -> anyhow::Result<f64> {
        let data_dir = scene.running.data_dir();
        inside_async(&scene.running.cluster.machine.netns(), || async {
            let slices: Api<EndpointSlice> = Api::default_namespaced(api::client(&data_dir).await?);
            let beat = tokio::time::interval(Duration::from_secs(1) / OTHERS as u32);
            let start = Instant::now();
            let beats = stream::unfold((beat, 0), |(mut beat, number)| async move {
                beat.tick().await;
                let go_on = !stop.load(Ordering::Relaxed);
                go_on.then_some((number, (beat, number + 1)))
            });
            let changes = beats.map(|number| {
                let slices = &slices;
                async move {
                    let mut slice = self.made[number % self.made.len()].slice.clone();
                    let endpoints =
                        slice.endpoints.as_mut().context("a slice without endpoints")?;
                    endpoints[0].addresses = vec![fresh.next()];
                    replace(slices, &slice).await
                }
            });
            let changes: Vec<()> = changes.buffer_unordered(AT_ONCE).try_collect().await?;
            Ok(changes.len() as f64 / start.elapsed().as_secs_f64())
        })
    }

    fn remove(self, scene: &Scene) -> anyhow::Result<()> {
        if !self.own {
            return Ok(());
        }
        inside_async(&scene.running.cluster.machine.netns(), || async {
            let client = api::client(&scene.running.data_dir()).await?;
            let services: Api<Service> = Api::default_namespaced(client.clone());
            let slices: Api<EndpointSlice> = Api::default_namespaced(client);
            for made in &self.made {
                let name = made.slice.name_any();
                services.delete(&name, &DeleteParams::default()).await?;
                slices.delete(&name, &DeleteParams::default()).await?;
            }
            Ok(())
        })
    }
}
