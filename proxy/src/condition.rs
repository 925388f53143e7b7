//! In what condition the proxy is: which mode and families are in force, and whether it hears of
//! others who change the rules.

use prometheus::{IntCounter, IntGaugeVec, Opts, Registry};

use crate::{config::Mode, model::Family};

/// Metrics of it. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Condition {
    /// Times that nothing was heard of others.
    pub(crate) deaf: IntCounter,
}

impl Condition {
    /// Registers what was chosen.
    ///
    /// # Errors
    /// When a name is registered already.
    pub(crate) fn register(
        registry: &Registry,
        (asked, mode): (Mode, Mode),
        served: &[Family],
        wanted: &[Family],
    ) -> Result<Self, prometheus::Error> {
        let modes = IntGaugeVec::new(
            Opts::new(
                "keelson_proxy_mode",
                "1 for the mode in force and the one that was asked for, which differ where that can't be used.",
            ),
            &["mode", "asked"],
        )?;
        modes.with_label_values(&[mode.as_str(), asked.as_str()]).set(1);
        let families = IntGaugeVec::new(
            Opts::new("keelson_proxy_family_served", "Whether Services of a family are served."),
            &["ip_family"],
        )?;
        for family in wanted {
            let is_served = served.contains(family);
            families.with_label_values(&[family.as_str()]).set(i64::from(is_served));
        }
        let deaf = IntCounter::new(
            "keelson_proxy_drift_detection_failures_total",
            "Times that it could not be heard or seen whether other programs changed the rules.",
        )?;
        registry.register(Box::new(modes))?;
        registry.register(Box::new(families))?;
        registry.register(Box::new(deaf.clone()))?;
        Ok(Self { deaf })
    }
}
