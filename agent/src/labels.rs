//! The labels and annotations by which the agent finds its own work again in the runtime.
//!
//! The names are those that the kubelet gives to what it makes over the CRI, so that crictl and log
//! collectors show pods of this agent as they show any others.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};
use keelson_runtime_shim::runtime::ContainerStatus;
use sha2::{Digest, Sha256};

/// The pod's name.
pub(crate) const POD_NAME: &str = "io.kubernetes.pod.name";
/// The pod's namespace.
pub(crate) const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// The pod's UID.
pub(crate) const POD_UID: &str = "io.kubernetes.pod.uid";
/// The container's name in the pod.
pub(crate) const CONTAINER_NAME: &str = "io.kubernetes.container.name";
/// Hash of what makes a running container outdated when it changes.
pub(crate) const HASH: &str = "io.kubernetes.container.hash";
/// The image as the pod names it; the runtime is asked for it by its id.
pub(crate) const IMAGE: &str = "keelson.dev/image";
/// How often it was restarted.
pub(crate) const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
/// Where the container may leave its last words.
pub(crate) const TERMINATION_MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
/// `File` or `FallbackToLogsOnError`.
pub(crate) const TERMINATION_MESSAGE_POLICY: &str =
    "io.kubernetes.container.terminationMessagePolicy";
/// The container's preStop handler as JSON, for a pod whose object is gone.
pub(crate) const PRE_STOP: &str = "io.kubernetes.container.preStopHandler";
/// The pod's grace period in seconds, for a pod whose object is gone.
pub(crate) const GRACE_PERIOD: &str = "io.kubernetes.pod.terminationGracePeriod";
/// Seconds that the next restart of this container waits after its end; absent on a first start.
pub(crate) const BACK_OFF: &str = "keelson.dev/restart-back-off-seconds";
/// Where on the host the container's termination message file is.
pub(crate) const TERMINATION_MESSAGE_FILE: &str = "keelson.dev/termination-message-file";

/// Where a pod that is not from the API came from.
pub(crate) const CONFIG_SOURCE: &str = "kubernetes.io/config.source";
/// The hash of a static pod: its UID.
pub(crate) const CONFIG_HASH: &str = "kubernetes.io/config.hash";
/// On the API's picture of a static pod: the static pod's hash.
pub(crate) const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";
/// When the agent first saw the pod.
pub(crate) const CONFIG_SEEN: &str = "kubernetes.io/config.seen";

/// The labels of a pod's sandbox: what identifies it, and the pod's own.
pub(crate) fn sandbox_labels(pod: &Pod) -> BTreeMap<String, String> {
    let mut labels = pod.metadata.labels.clone().unwrap_or_default();
    labels.extend(identity(pod));
    labels
}

/// The labels of a container.
pub(crate) fn container_labels(pod: &Pod, container: &str) -> BTreeMap<String, String> {
    let mut labels: BTreeMap<String, String> = identity(pod).into_iter().collect();
    labels.insert(CONTAINER_NAME.to_owned(), container.to_owned());
    labels
}

fn identity(pod: &Pod) -> [(String, String); 3] {
    let meta = &pod.metadata;
    [
        (POD_NAME.to_owned(), meta.name.clone().unwrap_or_default()),
        (POD_NAMESPACE.to_owned(), meta.namespace.clone().unwrap_or_default()),
        (POD_UID.to_owned(), meta.uid.clone().unwrap_or_default()),
    ]
}

/// The hash that tells whether a running container is still the one that is asked for.
///
/// As with the kubelet, only the name and the image count: no other field of a running container
/// can be changed but its resources, and those are changed in place.
pub(crate) fn container_hash(container: &Container) -> String {
    let mut hash = Sha256::new();
    hash.update(container.name.as_bytes());
    hash.update([0]);
    hash.update(container.image.as_deref().unwrap_or_default().as_bytes());
    hex(&hash.finalize()[..8])
}

/// Whether `status` was made from this very `container`.
pub(crate) fn is_current(status: &ContainerStatus, container: &Container) -> bool {
    status.annotations.get(HASH).is_none_or(|hash| *hash == container_hash(container))
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
