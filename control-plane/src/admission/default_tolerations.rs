//! DefaultTolerationSeconds: pods that do not say otherwise stay for five minutes on a node that is
//! not ready or cannot be reached.

use serde_json::{Value, json};

use super::{Admission, AdmissionRequest, Refusal};
use crate::auth::fields::{list, text};

/// `--default-not-ready-toleration-seconds` and `--default-unreachable-toleration-seconds`.
const SECONDS: u32 = 300;
const TAINTS: [&str; 2] = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];

pub(crate) struct DefaultTolerationSeconds;

impl Admission for DefaultTolerationSeconds {
    fn admit(
        &self,
        request: &AdmissionRequest<'_>,
        object: Option<&mut Value>,
    ) -> Result<(), Refusal> {
        let Some(pod) = object.filter(|_| request.creates_pod()) else { return Ok(()) };
        if !pod.get("spec").is_some_and(Value::is_object) {
            return Ok(()); // for validation to refuse
        }
        let mut tolerations = list(pod, &["spec", "tolerations"]).to_vec();
        for taint in TAINTS {
            let tolerated = tolerations.iter().any(|toleration| {
                let (key, effect) = (text(toleration, &["key"]), text(toleration, &["effect"]));
                (key == taint || key.is_empty()) && matches!(effect, "NoExecute" | "")
            });
            if !tolerated {
                tolerations.push(json!({
                    "key": taint,
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": SECONDS,
                }));
            }
        }
        pod["spec"]["tolerations"] = json!(tolerations);
        Ok(())
    }
}
