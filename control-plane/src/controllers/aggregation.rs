//! Cluster roles with an `aggregationRule`: their rules are those of all cluster roles that the rule
//! selects ("Aggregated ClusterRoles" in the documentation of RBAC). What somebody writes into them
//! is written over.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use keelson_api::{object::ObjectKey, selector::LabelSelector};
use kube::{Api, Client};
use tokio_util::sync::CancellationToken;

use super::{
    change::{self, Part},
    error::ControllerError,
    queue::WorkQueue,
};
use crate::informers::Informers;

const WORKERS: usize = 1;

/// Keeps the rules of aggregated cluster roles until `shutdown`.
pub(crate) async fn run(client: Client, informers: Arc<Informers>, shutdown: CancellationToken) {
    if !informers.cluster_roles.synced(&shutdown).await {
        return;
    }
    let queue = WorkQueue::new();
    let (add, with) = (queue.clone(), Arc::downgrade(&informers.cluster_roles));
    informers.cluster_roles.on_change(move |_| {
        // Any role may be a part of any other.
        let Some(roles) = with.upgrade() else { return };
        for role in roles.list().iter().filter(|role| role.aggregation_rule.is_some()) {
            add.add(ObjectKey::of(&role.metadata));
        }
    });
    let work = |key: ObjectKey| {
        let (client, informers) = (client.clone(), informers.clone());
        async move { aggregate(&client, &informers, &key).await }
    };
    queue.run("clusterrole-aggregation", WORKERS, shutdown, work).await;
}

async fn aggregate(
    client: &Client,
    informers: &Informers,
    key: &ObjectKey,
) -> Result<Option<Duration>, ControllerError> {
    let Some(role) = informers.cluster_roles.get(key) else { return Ok(None) };
    let Some(rules) = aggregated(&role, &informers.cluster_roles.list()) else { return Ok(None) };
    if role.rules.as_ref().is_some_and(|present| *present == rules) {
        return Ok(None);
    }
    let wanted = ClusterRole { rules: Some(rules), ..(*role).clone() };
    let api: Api<ClusterRole> = Api::all(client.clone());
    change::write(&api, &*role, &wanted, Part::Main).await?;
    Ok(None)
}

/// The rules that a role is to have: of each selector's roles by name, each rule once. `None` if it
/// is not aggregated, or a selector makes no sense.
fn aggregated(role: &ClusterRole, all: &[Arc<ClusterRole>]) -> Option<Vec<PolicyRule>> {
    let mut rules: Vec<PolicyRule> = Vec::new();
    for selector in role.aggregation_rule.as_ref()?.cluster_role_selectors.iter().flatten() {
        let selector = LabelSelector::from_k8s(selector).ok()?;
        let parts = all.iter().filter(|part| part.metadata.name != role.metadata.name);
        for part in parts {
            let labels = part.metadata.labels.clone().unwrap_or_default();
            if !selector.matches(&labels) {
                continue;
            }
            for rule in part.rules.iter().flatten() {
                if !rules.contains(rule) {
                    rules.push(rule.clone());
                }
            }
        }
    }
    Some(rules)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn role(name: &str, label: &str, verbs: &[&str], selects: Option<&str>) -> Arc<ClusterRole> {
        let mut role = json!({"metadata": {"name": name, "labels": {label: "true"}},
            "rules": [{"verbs": verbs, "apiGroups": [""], "resources": ["pods"]}]});
        if let Some(selects) = selects {
            let selector = json!({"matchLabels": {selects: "true"}});
            role["aggregationRule"] = json!({"clusterRoleSelectors": [selector]});
        }
        Arc::new(serde_json::from_value::<ClusterRole>(role).unwrap())
    }

    #[test]
    fn a_role_has_the_rules_of_what_it_selects_each_once() {
        let all = [
            role("a", "to-x", &["get"], None),
            role("b", "to-x", &["list"], None),
            role("c", "to-x", &["get"], None),
            role("d", "other", &["delete"], None),
            role("x", "to-x", &["own"], Some("to-x")),
        ];
        let rules = aggregated(&all[4], &all).unwrap();
        let verbs: Vec<Value> = rules.iter().map(|rule| json!(rule.verbs)).collect();
        assert_eq!(verbs, [json!(["get"]), json!(["list"])]);
        assert!(aggregated(&all[0], &all).is_none());
        let nothing = role("y", "l", &["own"], Some("none"));
        assert_eq!(aggregated(&nothing, &all).unwrap(), []);
    }
}
