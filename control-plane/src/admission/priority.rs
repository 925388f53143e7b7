//! Priority: a pod's `priorityClassName` becomes its `priority`.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{Admission, AdmissionRequest, Operation, Refusal};
use crate::{
    auth::fields::{at, name, text},
    lookup::Lookup,
};

/// The classes that every cluster has.
const SYSTEM_CLASSES: [(&str, i64); 2] =
    [("system-cluster-critical", 2_000_000_000), ("system-node-critical", 2_000_001_000)];

pub(crate) struct Priority {
    lookup: Arc<dyn Lookup>,
}

/// What a class means for a pod.
struct Class {
    name: String,
    value: i64,
    preemption: String,
}

impl Priority {
    pub(crate) fn new(lookup: Arc<dyn Lookup>) -> Self {
        Self { lookup }
    }

    fn class(&self, class: &str) -> Option<Class> {
        if let Some((name, value)) = SYSTEM_CLASSES.iter().find(|(name, _)| *name == class) {
            return Some(Class::new(name, *value, ""));
        }
        let found = self.lookup.get("scheduling.k8s.io", "priorityclasses", None, class)?;
        Some(Class::of(&found))
    }

    /// The class of pods that name none: the lowest of those marked as the default, if there are any.
    fn default_class(&self) -> Class {
        self.lookup
            .list("scheduling.k8s.io", "priorityclasses", None)
            .iter()
            .filter(|class| at(class, &["globalDefault"]).and_then(Value::as_bool) == Some(true))
            .map(|class| Class::of(class))
            .min_by_key(|class| class.value)
            .unwrap_or_else(|| Class::new("", 0, ""))
    }
}

impl Class {
    fn new(name: &str, value: i64, preemption: &str) -> Self {
        let preemption =
            if preemption.is_empty() { "PreemptLowerPriority" } else { preemption }.to_owned();
        Self { name: name.to_owned(), value, preemption }
    }

    fn of(object: &Value) -> Self {
        let value = at(object, &["value"]).and_then(Value::as_i64).unwrap_or_default();
        Self::new(name(object), value, text(object, &["preemptionPolicy"]))
    }
}

impl Admission for Priority {
    fn admit(
        &self,
        request: &AdmissionRequest<'_>,
        object: Option<&mut Value>,
    ) -> Result<(), Refusal> {
        let Some(pod) = object.filter(|_| request.is_for("", "pods")) else { return Ok(()) };
        if !pod.get("spec").is_some_and(Value::is_object) {
            return Ok(()); // for validation to refuse
        }
        match (request.operation, request.old) {
            (Operation::Create, _) => {}
            // A client that sends the object without what was filled in does not mean to remove it.
            (Operation::Update, Some(old)) => {
                for field in ["priority", "preemptionPolicy"] {
                    if let (None, Some(before)) =
                        (at(pod, &["spec", field]), at(old, &["spec", field]))
                    {
                        pod["spec"][field] = before.clone();
                    }
                }
                return Ok(());
            }
            _ => return Ok(()),
        }
        let class = match text(pod, &["spec", "priorityClassName"]) {
            "" => self.default_class(),
            named => self.class(named).ok_or_else(|| {
                let why = format!("no PriorityClass with name {named} was found");
                request.forbidden(Some(pod), &why)
            })?,
        };
        if let Some(given) = at(pod, &["spec", "priority"]).and_then(Value::as_i64)
            && given != class.value
        {
            let why = format!(
                "the integer value of priority ({given}) must not be provided in pod spec; priority \
                 admission controller computed {} from the given PriorityClass name",
                class.value
            );
            return Err(request.forbidden(Some(pod), &why));
        }
        let given = text(pod, &["spec", "preemptionPolicy"]);
        if !given.is_empty() && given != class.preemption {
            let why = format!(
                "the string value of PreemptionPolicy ({given}) must not be provided in pod spec; \
                 priority admission controller computed {} from the given PriorityClass name",
                class.preemption
            );
            return Err(request.forbidden(Some(pod), &why));
        }
        if !class.name.is_empty() {
            pod["spec"]["priorityClassName"] = json!(class.name);
        }
        pod["spec"]["priority"] = json!(class.value);
        pod["spec"]["preemptionPolicy"] = json!(class.preemption);
        Ok(())
    }
}
