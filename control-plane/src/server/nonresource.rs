//! Paths that are no resource: health, version, metrics, discovery, OpenAPI, token keys.

use std::fmt::Write as _;

use http::{HeaderValue, Method, StatusCode, header};
use keelson_api::metrics;
use serde_json::{Value, json};

use super::{
    core::{Call, Core},
    negotiate::Shape,
    respond::{self, Answer},
};
use crate::{
    discovery::{self, AggregatedVersion},
    registry::Registry,
    status::Status,
};

pub(crate) fn serve(core: &Core, call: &Call, method: &Method) -> Result<Answer, Status> {
    if !matches!(*method, Method::GET | Method::HEAD) {
        return Err(Status::method_not_allowed());
    }
    let parts: Vec<&str> = call.info.path.split('/').filter(|part| !part.is_empty()).collect();
    match parts.as_slice() {
        [probe @ ("healthz" | "livez" | "readyz"), check @ ..] => health(core, call, probe, check),
        ["version"] => plain(call, &version()),
        ["metrics"] => {
            let text = metrics::encode(&core.registered).map_err(Status::internal)?;
            Ok(respond::respond(StatusCode::OK, metrics::CONTENT_TYPE, respond::full(text)))
        }
        [".well-known", "openid-configuration"] => {
            let document = core.security.answers.openid_configuration();
            Ok(respond::document(StatusCode::OK, &document, Default::default()))
        }
        ["openid", "v1", "jwks"] => {
            let body = core.security.answers.key_set().to_string();
            let media_type = "application/jwk-set+json";
            Ok(respond::respond(StatusCode::OK, media_type, respond::full(body)))
        }
        ["api"] => discover(call, &core.registry, true, || {
            discovery::api_versions(&core.registry, &core.advertised)
        }),
        ["apis"] => {
            discover(call, &core.registry, false, || discovery::api_group_list(&core.registry))
        }
        ["api", version] => found(call, discovery::api_resource_list(&core.registry, "", version)),
        ["apis", group] => found(call, discovery::api_group(&core.registry, group)),
        ["apis", group, version] => {
            found(call, discovery::api_resource_list(&core.registry, group, version))
        }
        [] => plain(call, &json!({ "paths": paths(core) })),
        _ => Err(Status::unknown_path()),
    }
}

fn plain(call: &Call, document: &Value) -> Result<Answer, Status> {
    Ok(respond::document(StatusCode::OK, document, call.accept(&[])?))
}

fn found(call: &Call, document: Option<Value>) -> Result<Answer, Status> {
    plain(call, &document.ok_or_else(Status::unknown_path)?)
}

/// All groups, in one document if the client takes that.
fn discover(
    call: &Call,
    registry: &Registry,
    of_core: bool,
    plainly: impl FnOnce() -> Value,
) -> Result<Answer, Status> {
    let shapes =
        [AggregatedVersion::V2, AggregatedVersion::V2Beta1].map(Shape::AggregatedDiscovery);
    let accepted = call.accept(&shapes)?;
    let (document, media_type) = match accepted.shape {
        Shape::AggregatedDiscovery(version) => {
            (discovery::aggregated(registry, of_core, version), Some(version.content_type()))
        }
        _ => (plainly(), None),
    };
    let tag = discovery::etag(document.to_string().as_bytes());
    let mut answer = if has_already(call, &tag) {
        respond::respond(StatusCode::NOT_MODIFIED, "application/json", super::service::empty())
    } else {
        respond::document(StatusCode::OK, &document, accepted)
    };
    let headers = answer.headers_mut();
    headers.insert(header::VARY, HeaderValue::from_static("Accept"));
    headers.insert(header::ETAG, tag.parse().map_err(Status::internal)?);
    // Kept by clients, and asked about each time.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("public"));
    if let Some(media_type) = media_type {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    }
    Ok(answer)
}

pub(super) fn has_already(call: &Call, tag: &str) -> bool {
    let known = call.headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    known.is_some_and(|known| known.split(',').any(|k| k.trim() == tag))
}

/// The index of what there is.
fn paths(core: &Core) -> Vec<String> {
    let mut paths: Vec<String> = core
        .registry
        .resources()
        .flat_map(|resource| {
            let (group, version) = (&resource.group, &resource.version);
            if group.is_empty() {
                vec!["/api".to_owned(), format!("/api/{version}")]
            } else {
                let group = format!("/apis/{group}");
                vec!["/apis".to_owned(), format!("{group}/{version}"), group]
            }
        })
        .chain(
            [
                "/.well-known/openid-configuration",
                "/healthz",
                "/livez",
                "/metrics",
                "/openapi/v2",
                "/openapi/v3",
                "/openid/v1/jwks",
                "/readyz",
                "/version",
            ]
            .map(str::to_owned),
        )
        .collect();
    paths.sort();
    paths.dedup();
    paths
}

/// `/version`.
pub(crate) fn version() -> Value {
    let kubernetes = keelson_api::KUBERNETES_VERSION;
    let mut numbers = kubernetes.trim_start_matches('v').split('.');
    json!({
        "major": numbers.next().unwrap_or_default(),
        "minor": numbers.next().unwrap_or_default(),
        "gitVersion": format!("{kubernetes}+keelson"),
        "gitCommit": "",
        "gitTreeState": "",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "",
        "compiler": "rustc",
        "platform": format!("{}/{}", std::env::consts::OS, architecture()),
    })
}

/// As Go names it, and thus Kubernetes.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// `/healthz`, `/livez` and `/readyz`, whole or one check of it.
fn health(core: &Core, call: &Call, probe: &str, only: &[&str]) -> Result<Answer, Status> {
    let mut checks: Vec<(&str, bool)> =
        vec![("ping", true), ("log", true), ("etcd", core.store.is_healthy())];
    if probe != "livez" {
        checks.push(("poststarthook/start-apiserver-bootstrap", core.is_bootstrapped()));
    }
    if probe == "readyz" {
        checks.push(("shutdown", !core.shutdown.is_cancelled()));
    }
    if !only.is_empty() {
        let name = only.join("/");
        checks.retain(|(check, _)| *check == name);
        if checks.is_empty() {
            return Err(Status::unknown_path());
        }
    }
    let excluded: Vec<&str> = call.info.query.all("exclude").collect();
    checks.retain(|(check, _)| !excluded.contains(check));
    let failed = checks.iter().any(|(_, ok)| !ok);
    let code = if failed { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::OK };
    if !failed && !call.info.query.has("verbose") {
        return Ok(respond::text(code, "ok"));
    }
    let mut text = String::new();
    for (check, ok) in &checks {
        let line = if *ok {
            writeln!(text, "[+]{check} ok")
        } else {
            writeln!(text, "[-]{check} failed: reason withheld")
        };
        line.map_err(Status::internal)?;
    }
    let result = if failed { "failed" } else { "passed" };
    writeln!(text, "{probe} check {result}").map_err(Status::internal)?;
    Ok(respond::text(code, text))
}
