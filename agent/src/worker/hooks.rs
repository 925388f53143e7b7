//! postStart and preStop handlers.

use std::{net::IpAddr, time::Duration};

use k8s_openapi::api::core::v1::{Container, LifecycleHandler};
use keelson_runtime_shim::runtime::{ContainerId, PodRuntime};

use crate::probe::{http, target};

/// How long an HTTP hook may take where nothing else bounds it.
const HTTP_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs one handler to its end; the error says what went wrong, for an event.
pub(crate) async fn run(
    runtime: &dyn PodRuntime,
    id: &ContainerId,
    container: &Container,
    handler: &LifecycleHandler,
    address: Option<IpAddr>,
) -> Result<(), String> {
    if let Some(exec) = &handler.exec {
        let command = exec.command.clone().unwrap_or_default();
        let shown = command.join(" ");
        return match runtime.exec_sync(id, &command, None).await {
            Ok(output) if output.exit_code == 0 => Ok(()),
            Ok(output) => Err(format!(
                "Exec lifecycle hook ({shown}) for Container {:?} failed - error: command exited \
                 with {}, message: {:?}",
                container.name,
                output.exit_code,
                String::from_utf8_lossy(&[output.stdout, output.stderr].concat())
            )),
            Err(error) => Err(format!(
                "Exec lifecycle hook ({shown}) for Container {:?} failed - error: {error}",
                container.name
            )),
        };
    }
    if let Some(get) = &handler.http_get {
        let address = address.ok_or_else(|| "the pod has no address".to_owned())?;
        let target = target::http_target(get, container, address)?;
        return http::answers(&target, HTTP_TIMEOUT, "kube-lifecycle/1.36").await.map_err(
            |reason| {
                format!(
                    "HTTP lifecycle hook ({}) for Container {:?} failed - error: {reason}",
                    target.path, container.name
                )
            },
        );
    }
    if let Some(sleep) = &handler.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
        return Ok(());
    }
    // tcpSocket was never supported as a hook and is documented to fail when it runs
    Err(format!(
        "invalid handler for Container {:?}: only exec, httpGet and sleep can be run",
        container.name
    ))
}
