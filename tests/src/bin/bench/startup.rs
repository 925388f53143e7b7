//! From the start of the process to a node that is ready, and the size of what is started.

use std::{fs, process::Command, time::Instant};

use anyhow::Context;
use jiff::Timestamp;
use k8s_openapi::api::{coordination::v1::Lease, core::v1::Node};
use keelson_tests::Machine;
use kube::Api;

use crate::{
    api,
    inside::inside_async,
    node::Running,
    report::{Figure, Section, Unit},
    statistics::Samples,
};

/// Starts `rounds` clusters from nothing, and each again after a kill.
pub(crate) fn measure(rounds: usize) -> anyhow::Result<Section> {
    let (mut answers, mut ready) = (Samples::default(), Samples::default());
    let (mut answers_again, mut alive_again) = (Samples::default(), Samples::default());
    let mut version = Samples::default();
    for round in 0..rounds {
        eprintln!("start-up: {} of {rounds}", round + 1);
        let started = Instant::now();
        let mut running = Running::start()?;
        answers.add(api::milliseconds(started, running.answered));
        ready.add(api::milliseconds(started, running.ready));

        let alone = Instant::now();
        let output = Command::new(Machine::binary()).arg("version").output();
        output.context("keelson version")?;
        version.add(api::milliseconds(alone, Instant::now()));

        running.cluster.kill_process();
        let before = Timestamp::now();
        let started = Instant::now();
        running.cluster.start_process();
        let (answered, alive) = wait_again(&running, before)?;
        answers_again.add(api::milliseconds(started, answered));
        alive_again.add(api::milliseconds(started, alive));
        running.stop();
    }
    Ok(Section {
        title: "Start-up of `keelson up`, from its execution; beside it the same binary saying its version"
            .to_owned(),
        command: "tools/bench --only startup".to_owned(),
        figures: vec![
            Figure::new("nothing there: the API answers", Unit::Milliseconds, answers)
                .beside("keelson version", version.clone()),
            Figure::new("nothing there: the node is Ready", Unit::Milliseconds, ready)
                .beside("keelson version", version.clone()),
            Figure::new("after kill -9: the API answers", Unit::Milliseconds, answers_again)
                .beside("keelson version", version.clone()),
            Figure::new("after kill -9: the node's lease is renewed", Unit::Milliseconds, alive_again)
                .beside("keelson version", version),
            size("size of the binary")?,
        ],
    })
}

/// Waits until a cluster that was started once more answers, and its node is heard of.
fn wait_again(running: &Running, before: Timestamp) -> anyhow::Result<(Instant, Instant)> {
    let data_dir = running.cluster.machine.data_dir();
    let pid = running.cluster.pid();
    inside_async(&running.cluster.machine.netns(), || async move {
        let (client, answered) = api::answering(&data_dir, pid).await?;
        let leases: Api<Lease> = Api::namespaced(client, "kube-node-lease");
        let alive = api::until(&leases, "the node's lease to be renewed", |lease| {
            let renewed = lease.spec.as_ref().and_then(|spec| spec.renew_time.as_ref());
            renewed.is_some_and(|time| time.0 > before)
        })
        .await?;
        Ok((answered, alive))
    })
}

fn size(what: &str) -> anyhow::Result<Figure> {
    let megabytes = |path: &std::path::Path| -> anyhow::Result<f64> {
        let metadata = fs::metadata(path).with_context(|| path.display().to_string())?;
        Ok(metadata.len() as f64 / 1e6)
    };
    let figure = Figure::new(what, Unit::Megabytes, Samples::one(megabytes(&Machine::binary())?));
    let found = Command::new("which").arg("kubectl").output().context("which")?;
    let kubectl = String::from_utf8_lossy(&found.stdout).trim().to_owned();
    Ok(figure.beside("kubectl's", Samples::one(megabytes(kubectl.as_ref())?)))
}

/// Whether a node's condition `Ready` is true.
pub(crate) fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}
