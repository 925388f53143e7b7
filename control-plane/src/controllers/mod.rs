//! The controllers: loops that bring the cluster to what its objects say.
//!
//! ```text
//! informers ──change──► work queue ──key──► observe ──► plan ──► apply
//! (one watch a type)   (each key once,      (memory)   (pure)   (small writes, on condition
//!                       back-off, bounded)                       that nothing changed meanwhile)
//! ```
//!
//! Each controller is a folder or file with its own queue, its own identity
//! (`system:serviceaccount:kube-system:<name>`) and no state that it can't rebuild by looking.
//!
//! * [`replicaset`], [`deployment`]: pods, as many as asked for, and their updates.
//! * [`endpointslice`]: which pods stand behind a Service.
//! * [`namespace`], [`gc`]: what goes when something else goes.
//! * [`mirror`]: EndpointSlices of Endpoints that somebody wrote by hand.
//! * [`furnish`]: what every namespace has.
//! * [`aggregation`]: cluster roles that are made of others.
//! * [`node`], [`podgc`]: nodes that come, go and fall silent, and what that means for pods.
//!
//! Shared: [`queue`], [`change`] (small conditional writes), [`claim`] (adoption), [`expectations`]
//! (what was written but not yet seen), [`pods`] and [`names`].

mod aggregation;
pub(crate) mod change;
mod claim;
mod deployment;
mod discover;
mod endpointslice;
pub(crate) mod error;
mod expectations;
mod furnish;
mod gc;
mod mirror;
mod names;
mod namespace;
mod node;
mod podgc;
mod pods;
pub(crate) mod queue;
mod replicaset;
#[cfg(test)]
mod tests;

use std::{future::Future, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use ipnet::IpNet;
use keelson_api::events::EventRecorder;
use kube::Client;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::informers::Informers;

pub use self::node::ipam::PodRanges;

/// What the controllers must be told.
#[derive(Clone, Debug)]
pub struct ControllersConfig {
    /// The certificate authority that the API server's certificate is of, in PEM: what pods get
    /// to verify it by.
    pub root_ca_pem: String,
    /// The ranges that nodes get their pod addresses from; without a range nodes get none.
    pub pod_ranges: PodRanges,
    /// How long a node may be silent before it counts as unreachable.
    pub node_grace_period: Duration,
    /// How many pods that have ended may stay; 0 for any number.
    pub terminated_pods: usize,
}

impl ControllersConfig {
    /// Kubernetes' defaults, with what has none.
    pub fn new(root_ca_pem: String, cluster_ranges: Vec<IpNet>) -> Self {
        Self {
            root_ca_pem,
            pod_ranges: PodRanges {
                cluster: cluster_ranges,
                node_prefix_v4: 24,
                node_prefix_v6: 64,
            },
            // --node-monitor-grace-period, 50 s since 1.32.
            node_grace_period: Duration::from_secs(50),
            terminated_pods: 12_500,
        }
    }
}

/// Starts all controllers and waits for their end after `shutdown`.
///
/// `client_for` gives the client of a controller, by its documented name (`deployment-controller`);
/// each acts as the service account of that name in `kube-system`.
pub async fn run(
    client_for: impl Fn(&str) -> Client,
    informers: Arc<Informers>,
    config: ControllersConfig,
    shutdown: CancellationToken,
) {
    let tasks = TaskTracker::new();
    let start = Start { client_for: &client_for, shutdown: &shutdown, tasks: &tasks };
    let with = informers.clone();
    start.with_events("replicaset-controller", |client, events, shutdown| {
        Box::pin(replicaset::run(client, with, events, shutdown))
    });
    let with = informers.clone();
    start.with_events("deployment-controller", |client, events, shutdown| {
        Box::pin(deployment::run(client, with, events, shutdown))
    });
    let endpoints = client_for("endpoint-controller");
    let with = informers.clone();
    start.with_events("endpointslice-controller", |slices, events, shutdown| {
        let clients = endpointslice::Clients { slices, endpoints };
        Box::pin(endpointslice::run(clients, with, events, shutdown))
    });
    let client = client_for("endpointslicemirroring-controller");
    start.spawn(mirror::run(client, informers.clone(), shutdown.clone()));
    let client = client_for("clusterrole-aggregation-controller");
    start.spawn(aggregation::run(client, informers.clone(), shutdown.clone()));
    let client = client_for("namespace-controller");
    start.spawn(namespace::run(client, informers.clone(), shutdown.clone()));
    let client = client_for("generic-garbage-collector");
    start.spawn(gc::run(client, informers.clone(), shutdown.clone()));
    let client = client_for("service-account-controller");
    start.spawn(furnish::run_accounts(client, informers.clone(), shutdown.clone()));
    let client = client_for("root-ca-cert-publisher");
    let pem = config.root_ca_pem.into();
    start.spawn(furnish::run_root_ca(client, informers.clone(), pem, shutdown.clone()));
    let with = informers.clone();
    let grace_period = config.node_grace_period;
    start.with_events("node-controller", |client, events, shutdown| {
        let ranges = config.pod_ranges;
        Box::pin(async move {
            let (c, i, e, s) = (client.clone(), with.clone(), events.clone(), shutdown.clone());
            let lifecycle = Box::pin(node::run(c, i, e, grace_period, s));
            let (c, i, e, s) = (client.clone(), with.clone(), events.clone(), shutdown.clone());
            let eviction = Box::pin(node::eviction::run(c, i, e, s));
            let ipam = Box::pin(node::ipam::run(client, with, events, ranges, shutdown));
            futures::future::join3(lifecycle, eviction, ipam).await;
        })
    });
    let client = client_for("pod-garbage-collector");
    start.spawn(podgc::run(client, informers, config.terminated_pods, shutdown.clone()));
    tasks.close();
    tasks.wait().await;
}

struct Start<'a, F> {
    client_for: &'a F,
    shutdown: &'a CancellationToken,
    tasks: &'a TaskTracker,
}

impl<F: Fn(&str) -> Client> Start<'_, F> {
    /// Starts a controller that records events under its name.
    fn with_events(
        &self,
        name: &'static str,
        run: impl FnOnce(Client, EventRecorder, CancellationToken) -> BoxFuture<'static, ()>,
    ) {
        let client = (self.client_for)(name);
        let (events, writer) =
            EventRecorder::spawn(client.clone(), name, None, self.shutdown.clone());
        let controller = run(client, events, self.shutdown.clone());
        self.spawn(async move {
            controller.await;
            if let Err(error) = writer.await {
                tracing::debug!(name, %error, "event recorder");
            }
        });
    }

    fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(future);
    }
}
