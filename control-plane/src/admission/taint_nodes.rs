//! TaintNodesByCondition: a new node is tainted `node.kubernetes.io/not-ready:NoSchedule` until its
//! conditions are known, so that no pod lands on it in between.

use serde_json::{Value, json};

use super::{Admission, AdmissionRequest, Operation, Refusal};
use crate::auth::fields::{list, text};

const NOT_READY: &str = "node.kubernetes.io/not-ready";

pub(crate) struct TaintNodesByCondition;

impl Admission for TaintNodesByCondition {
    fn admit(
        &self,
        request: &AdmissionRequest<'_>,
        object: Option<&mut Value>,
    ) -> Result<(), Refusal> {
        let Some(node) = object else { return Ok(()) };
        if request.operation != Operation::Create
            || !request.is_for("", "nodes")
            || !node.is_object()
        {
            return Ok(());
        }
        let taints = list(node, &["spec", "taints"]);
        let tainted = taints.iter().any(|taint| {
            text(taint, &["key"]) == NOT_READY && text(taint, &["effect"]) == "NoSchedule"
        });
        if !tainted {
            let mut taints = taints.to_vec();
            taints.push(json!({ "key": NOT_READY, "effect": "NoSchedule" }));
            if !node.get("spec").is_some_and(Value::is_object) {
                node["spec"] = json!({});
            }
            node["spec"]["taints"] = json!(taints);
        }
        Ok(())
    }
}
