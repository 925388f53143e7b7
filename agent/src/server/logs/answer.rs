//! Which log is meant, and the answer that carries it.

use std::sync::Arc;

use bytes::Bytes;
use http::StatusCode;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use keelson_runtime_shim::runtime::ContainerStatus;
use tokio::sync::mpsc;

use super::{LogFile, LogOptions, follow};
use crate::{
    server::{
        Shared,
        answer::{Answer, refused, streamed},
        attempts, find, has_container,
        path::PodPath,
    },
    status::container::reported,
};

/// Answers `/containerLogs`.
pub(in crate::server) fn container_logs(
    shared: &Shared,
    path: &PodPath,
    container: &str,
    query: &[(String, String)],
) -> Answer {
    let options = match LogOptions::parse(query, Timestamp::now()) {
        Ok(options) => options,
        Err(why) => return refused(StatusCode::UNPROCESSABLE_ENTITY, &why),
    };
    let (pod, runtime_pod) = match find(shared, path) {
        Ok(found) => found,
        Err(answer) => return *answer,
    };
    let full_name = format!("{}_{}", path.name, path.namespace);
    if !has_container(&pod, container) {
        let why = format!("container \"{container}\" not found in pod \"{full_name}\"");
        return refused(StatusCode::NOT_FOUND, &why);
    }
    let attempts = attempts(&runtime_pod, container);
    let attempt = match which(&pod, container, &attempts, options.previous) {
        Ok(attempt) => attempt,
        Err(why) => return refused(StatusCode::BAD_REQUEST, &why),
    };
    let file = LogFile { path: attempt.log_path.clone() };
    let (sender, receiver) = mpsc::channel::<Bytes>(8);
    let runtime = (Arc::clone(&shared.sources.runtime), attempt.id.clone());
    let shutdown = shared.shutdown.clone();
    shared.streams.spawn(async move {
        tokio::select! {
            result = follow(file, options, runtime, sender.clone()) => {
                if let Err(error) = result {
                    let said = Bytes::from(format!("failed to read the log: {error}\n"));
                    let _ = sender.send(said).await;
                }
            }
            () = shutdown.cancelled() => {}
        }
    });
    streamed(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver)))
}

/// The attempt whose log is meant, chosen by the container's status as the kubelet does, so that
/// `previous` means what `lastState` shows; the error has the kubelet's words.
fn which<'a>(
    pod: &Pod,
    container: &str,
    attempts: &[&'a ContainerStatus],
    previous: bool,
) -> Result<&'a ContainerStatus, String> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let status = reported(pod, container);
    let state = status.and_then(|status| status.state.as_ref());
    let waiting = state.and_then(|state| state.waiting.as_ref());
    let found = if previous {
        let ended = status.and_then(|status| {
            status.last_state.as_ref()?.terminated.as_ref()?.container_id.as_ref()
        });
        let id = ended.and_then(|id| id.rsplit('/').next());
        id.and_then(|id| attempts.iter().find(|attempt| attempt.id.as_str() == id))
    } else {
        attempts.iter().find(|attempt| attempt.started_at.is_some()).or(attempts.first())
    };
    found.copied().ok_or_else(|| {
        if previous {
            return format!(
                "previous terminated container \"{container}\" in pod \"{name}\" not found"
            );
        }
        let reason = waiting.and_then(|waiting| waiting.reason.as_deref());
        format!(
            "container \"{container}\" in pod \"{name}\" is waiting to start: {}",
            reason.unwrap_or("ContainerCreating")
        )
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{
        self as api, ContainerState, ContainerStateTerminated, PodStatus,
    };

    use super::*;
    use crate::worker::fixture;

    fn ended(id: &str) -> ContainerState {
        ContainerState {
            terminated: Some(ContainerStateTerminated {
                container_id: Some(format!("keelson://{id}")),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn previous_is_what_the_last_state_shows() {
        let mut pod = fixture::pod(&["a"]);
        let (new, old) = (fixture::exited("a", 1, 1), fixture::exited("a", 0, 1));
        let attempts = [&new, &old];
        let refused = which(&pod, "a", &attempts, true).unwrap_err();
        assert_eq!(refused, "previous terminated container \"a\" in pod \"web\" not found");
        for id in ["a-1", "a-0"] {
            pod.status = Some(PodStatus {
                container_statuses: Some(vec![api::ContainerStatus {
                    name: "a".to_owned(),
                    last_state: Some(ended(id)),
                    ..Default::default()
                }]),
                ..Default::default()
            });
            assert_eq!(which(&pod, "a", &attempts, true).unwrap().id.as_str(), id);
            assert_eq!(which(&pod, "a", &attempts, false).unwrap().id.as_str(), "a-1");
        }
        let waiting = which(&pod, "a", &[], false).unwrap_err();
        assert!(waiting.ends_with("is waiting to start: ContainerCreating"), "{waiting}");
    }
}
