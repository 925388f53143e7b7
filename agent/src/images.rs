//! Getting a container's image: the pull policy, a bound on parallel pulls, the events.

use std::{sync::Arc, time::Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};
use keelson_api::events::EventType;
use keelson_runtime_shim::runtime::{Image, RuntimeError};

use crate::{
    pull_secrets,
    worker::{Context, backoff, start::StartError},
};

/// An image that is there.
pub(crate) struct Ready {
    /// How the runtime is asked for it.
    pub(crate) reference: String,
    /// What the store knows of it.
    pub(crate) image: Image,
}

/// The documented default of `imagePullPolicy`: `Always` for `latest` or no tag at all, unless the
/// image is named by digest.
pub(crate) fn default_policy(image: &str) -> &'static str {
    if image.contains('@') {
        return "IfNotPresent";
    }
    let last = image.rsplit('/').next().unwrap_or(image);
    match last.split_once(':') {
        Some((_, tag)) if tag != "latest" => "IfNotPresent",
        _ => "Always",
    }
}

/// Makes sure that the container's image is in the store.
pub(crate) async fn ensure(
    context: &Arc<Context>,
    pod: &Pod,
    container: &Container,
) -> Result<Ready, StartError> {
    let image = container.image.as_deref().unwrap_or_default();
    let policy = container.image_pull_policy.as_deref().unwrap_or_else(|| default_policy(image));
    let event = |kind, reason: &str, message: String| {
        context.container_event(pod, &container.name, kind, reason, message);
    };
    let found = context
        .timed("image_status", context.runtime.image_status(image))
        .await
        .map_err(|error| invalid_name(context, pod, container, error))?;
    match (found, policy) {
        (Some(found), "IfNotPresent" | "Never") => {
            event(
                EventType::Normal,
                "Pulled",
                format!(
                    "Container image \"{image}\" already present on machine and can be accessed \
                     by the pod"
                ),
            );
            let reference = reference_of(&found, image);
            Ok(Ready { reference, image: found })
        }
        (None, "Never") => {
            let message =
                format!("Container image \"{image}\" is not present with pull policy of Never");
            event(EventType::Warning, "ErrImageNeverPull", message.clone());
            event(EventType::Warning, "Failed", "Error: ErrImageNeverPull".to_owned());
            Err(StartError { reason: "ErrImageNeverPull", message })
        }
        _ => pull(context, pod, container, image).await,
    }
}

fn reference_of(image: &Image, name: &str) -> String {
    if image.id.as_str().is_empty() { name.to_owned() } else { image.id.to_string() }
}

async fn pull(
    context: &Arc<Context>,
    pod: &Pod,
    container: &Container,
    image: &str,
) -> Result<Ready, StartError> {
    let event = |kind, reason: &str, message: String| {
        context.container_event(pod, &container.name, kind, reason, message);
    };
    let failed = |error: RuntimeError| {
        if matches!(error, RuntimeError::InvalidImageName { .. }) {
            return invalid_name(context, pod, container, error);
        }
        let message = error.to_string();
        event(EventType::Warning, "Failed", format!("Failed to pull image \"{image}\": {message}"));
        event(EventType::Warning, "Failed", "Error: ErrImagePull".to_owned());
        StartError { reason: "ErrImagePull", message }
    };
    let auth = pull_secrets::for_image(context, pod, image).await;
    event(EventType::Normal, "Pulling", format!("Pulling image \"{image}\""));
    let asked = Instant::now();
    // closed never: the semaphore lives as long as the context
    let _permit = context
        .pulls
        .acquire()
        .await
        .map_err(|error| StartError { reason: "ErrImagePull", message: error.to_string() })?;
    let begun = Instant::now();
    let reference = context
        .timed("pull_image", context.runtime.pull_image(image, &auth))
        .await
        .map_err(failed)?;
    let pulled = context
        .timed("image_status", context.runtime.image_status(&reference))
        .await
        .map_err(failed)?;
    let Some(pulled) = pulled else {
        return Err(failed(RuntimeError::NotFound(format!("image {reference} after its pull"))));
    };
    context.metrics.image_pulled(pulled.size, begun.elapsed());
    event(
        EventType::Normal,
        "Pulled",
        format!(
            "Successfully pulled image \"{image}\" in {} ({} including waiting). Image size: {} \
             bytes.",
            backoff::go_duration(begun.elapsed()),
            backoff::go_duration(asked.elapsed()),
            pulled.size
        ),
    );
    tracing::info!(image, at = %Timestamp::now(), "image pulled");
    Ok(Ready { reference: reference_of(&pulled, &reference), image: pulled })
}

fn invalid_name(
    context: &Context,
    pod: &Pod,
    container: &Container,
    error: RuntimeError,
) -> StartError {
    let image = container.image.as_deref().unwrap_or_default();
    let event = |reason: &str, message: String| {
        context.container_event(pod, &container.name, EventType::Warning, reason, message);
    };
    if matches!(error, RuntimeError::InvalidImageName { .. }) {
        let message = format!("Failed to apply default image tag \"{image}\": {error}");
        event("InspectFailed", message.clone());
        event("Failed", "Error: InvalidImageName".to_owned());
        return StartError { reason: "InvalidImageName", message };
    }
    let message = format!("Failed to inspect image \"{image}\": {error}");
    event("InspectFailed", message.clone());
    event("Failed", "Error: ImageInspectError".to_owned());
    StartError { reason: "ImageInspectError", message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_follows_the_tag() {
        let rows = [
            ("app", "Always"),
            ("app:latest", "Always"),
            ("app:1", "IfNotPresent"),
            ("registry.example:5000/app", "Always"),
            ("registry.example:5000/app:1", "IfNotPresent"),
            ("app@sha256:0", "IfNotPresent"),
        ];
        for (image, policy) in rows {
            assert_eq!(default_policy(image), policy, "{image}");
        }
    }
}
