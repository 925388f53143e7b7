//! What every component of Kubernetes tells of itself: which release it is, which features are on,
//! how many metrics it has.

use prometheus::{IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry};

use super::process;
use crate::KUBERNETES_VERSION;

/// Registers the release, and what the kernel counts of the process.
///
/// # Errors
/// When a name is registered already.
pub fn register(registry: &Registry) -> Result<(), prometheus::Error> {
    let (major, minor) = release(KUBERNETES_VERSION);
    let platform = format!("linux/{}", architecture());
    let build = gauge(
        registry,
        "kubernetes_build_info",
        "The release of Kubernetes whose behaviour this is.",
        &[
            "build_date",
            "compiler",
            "git_commit",
            "git_tree_state",
            "git_version",
            "go_version",
            "major",
            "minor",
            "platform",
        ],
    )?;
    let labels = ["", "rustc", "", "", KUBERNETES_VERSION, "", major, minor, platform.as_str()];
    build.with_label_values(&labels).set(1);
    let version = gauge(
        registry,
        "version_info",
        "The release whose behaviour this is, and the oldest that it works with.",
        &["binary", "component", "emulation", "min_compat"],
    )?;
    let now = format!("{major}.{minor}");
    let before = minor.parse::<u32>().map_or(0, |minor| minor.saturating_sub(1));
    let before = format!("{major}.{before}");
    version.with_label_values(&[now.as_str(), "kube", now.as_str(), before.as_str()]).set(1);
    registry.register(Box::new(process::Process::new()?))
}

/// Registers how many metrics there are by their stability, none of which is hidden or switched off.
///
/// # Errors
/// When a name is registered already.
pub fn register_counts<'a>(
    registry: &Registry,
    levels: impl IntoIterator<Item = &'a str>,
) -> Result<(), prometheus::Error> {
    let options = Opts::new("registered_metrics_total", "Metrics by their stability.");
    let registered = IntCounterVec::new(options, &["deprecated_version", "stability_level"])?;
    for level in levels {
        registered.with_label_values(&["", level]).inc();
    }
    registry.register(Box::new(registered))?;
    for (name, help) in [
        ("disabled_metrics_total", "Metrics that are switched off."),
        ("hidden_metrics_total", "Metrics that are hidden."),
    ] {
        registry.register(Box::new(IntCounter::new(name, help)?))?;
    }
    Ok(())
}

/// Registers which features are on, by name and stage (`ALPHA`, `BETA`, or empty).
///
/// # Errors
/// When the name is registered already.
pub fn register_features<'a>(
    registry: &Registry,
    features: impl IntoIterator<Item = (&'a str, &'a str, bool)>,
) -> Result<(), prometheus::Error> {
    let help = "Whether a feature is on.";
    let enabled = gauge(registry, "kubernetes_feature_enabled", help, &["name", "stage"])?;
    for (name, stage, on) in features {
        enabled.with_label_values(&[name, stage]).set(i64::from(on));
    }
    Ok(())
}

fn gauge(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntGaugeVec, prometheus::Error> {
    let gauge = IntGaugeVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(gauge.clone()))?;
    Ok(gauge)
}

/// `v1.36.0` as `1` and `36`.
fn release(version: &str) -> (&str, &str) {
    let mut parts = version.trim_start_matches('v').split('.');
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
}

/// As Go calls it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_component_tells_its_release_and_its_features() {
        let registry = Registry::new();
        register(&registry).unwrap();
        register_counts(&registry, ["ALPHA", "ALPHA", "BETA"]).unwrap();
        register_features(&registry, [("One", "ALPHA", true), ("Two", "", false)]).unwrap();
        let text = crate::metrics::encode(&registry).unwrap();
        for line in [
            "registered_metrics_total{deprecated_version=\"\",stability_level=\"ALPHA\"} 2",
            "hidden_metrics_total 0",
            "kubernetes_feature_enabled{name=\"One\",stage=\"ALPHA\"} 1",
            "kubernetes_feature_enabled{name=\"Two\",stage=\"\"} 0",
            "component=\"kube\",emulation=\"1.36\",min_compat=\"1.35\"} 1",
        ] {
            assert!(text.contains(line), "{line} isn't in {text}");
        }
        let build = text.lines().find(|line| line.starts_with("kubernetes_build_info{")).unwrap();
        for label in ["git_version=\"v1.36.0\"", "major=\"1\"", "minor=\"36\""] {
            assert!(build.contains(label), "{build}");
        }
    }
}
