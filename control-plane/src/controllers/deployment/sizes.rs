//! How large each ReplicaSet of a Deployment is to be: the arithmetic of rolling updates.
//!
//! All functions change the sizes in a [`Rollout`], a model that the plan compares with what is.

use k8s_openapi::{
    api::apps::v1::{Deployment, ReplicaSet},
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::revision::{self, DESIRED_REPLICAS, MAX_REPLICAS};

/// A Deployment's sets as they are to be, and which of them is the newest.
#[derive(Clone, Debug)]
pub(crate) struct Rollout {
    pub(crate) sets: Vec<ReplicaSet>,
    pub(crate) newest: Option<usize>,
    /// How many pods the Deployment is to have.
    pub(crate) wanted: i32,
    /// How many more there may be meanwhile.
    pub(crate) surge: i32,
    /// How many of the wanted may be unavailable meanwhile.
    pub(crate) unavailable: i32,
}

/// The size that is asked of a set.
pub(crate) fn size(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
}

fn available(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|s| s.available_replicas).unwrap_or(0)
}

/// Whether a Deployment replaces its pods all at once.
pub(crate) fn recreates(deployment: &Deployment) -> bool {
    let strategy = deployment.spec.as_ref().and_then(|s| s.strategy.as_ref());
    strategy.and_then(|s| s.type_.as_deref()) == Some("Recreate")
}

/// `maxSurge` and `maxUnavailable` in pods: shares of surge are rounded up, shares of
/// unavailability down, and they are not both 0 (documented).
pub(crate) fn bounds(deployment: &Deployment) -> (i32, i32) {
    let Some(spec) = &deployment.spec else { return (0, 0) };
    if recreates(deployment) {
        return (0, 0);
    }
    let wanted = spec.replicas.unwrap_or(1);
    let rolling = spec.strategy.as_ref().and_then(|s| s.rolling_update.as_ref());
    let quarter = IntOrString::String("25%".to_owned());
    let surge = rolling.and_then(|r| r.max_surge.as_ref()).unwrap_or(&quarter);
    let unavailable = rolling.and_then(|r| r.max_unavailable.as_ref()).unwrap_or(&quarter);
    let surge = resolve(surge, wanted, true);
    match resolve(unavailable, wanted, false) {
        0 if surge == 0 => (0, wanted.min(1)),
        unavailable => (surge, unavailable.min(wanted)),
    }
}

fn resolve(value: &IntOrString, of: i32, round_up: bool) -> i32 {
    match value {
        IntOrString::Int(number) => (*number).max(0),
        IntOrString::String(text) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            let share = percent.max(0) * i64::from(of);
            let rounded = if round_up { (share + 99) / 100 } else { share / 100 };
            i32::try_from(rounded).unwrap_or(i32::MAX)
        }
    }
}

impl Rollout {
    fn total(&self) -> i32 {
        self.sets.iter().map(size).sum()
    }

    /// Old sets, oldest first.
    pub(crate) fn old(&self) -> Vec<usize> {
        let mut old: Vec<usize> =
            (0..self.sets.len()).filter(|i| Some(*i) != self.newest).collect();
        old.sort_by_cached_key(|i| revision::age_key(&self.sets[*i]));
        old
    }

    fn resize(&mut self, index: usize, to: i32) {
        let (wanted, most) = (self.wanted, self.wanted + self.surge);
        let set = &mut self.sets[index];
        if let Some(spec) = &mut set.spec {
            spec.replicas = Some(to);
        }
        revision::note_sizes(set, wanted, most);
    }

    /// How large the newest set may be now, given what else there is.
    pub(crate) fn newest_size(&self, present: i32, recreate: bool) -> i32 {
        if recreate {
            return self.wanted;
        }
        let most = self.wanted + self.surge;
        let total = self.total();
        if total >= most {
            return present;
        }
        present + (most - total).min(self.wanted - present)
    }

    /// Brings the newest set nearer to its size; whether that changed anything.
    pub(crate) fn scale_newest(&mut self, recreate: bool) -> bool {
        let Some(newest) = self.newest else { return false };
        let present = size(&self.sets[newest]);
        let to =
            if present > self.wanted { self.wanted } else { self.newest_size(present, recreate) };
        if to == present {
            return false;
        }
        self.resize(newest, to);
        true
    }

    /// Takes pods from old sets as far as enough others are available: first those that are not
    /// available anyway, then others, oldest sets first. Whether that changed anything.
    pub(crate) fn scale_down_old(&mut self) -> bool {
        let Some(newest) = self.newest else { return false };
        let old = self.old();
        if old.iter().all(|i| size(&self.sets[*i]) == 0) {
            return false;
        }
        let least = self.wanted - self.unavailable;
        let newest_missing = size(&self.sets[newest]) - available(&self.sets[newest]);
        let mut may_go = self.total() - least - newest_missing;
        if may_go <= 0 {
            return false;
        }
        let mut changed = false;
        for &i in &old {
            let (present, ready) = (size(&self.sets[i]), available(&self.sets[i]));
            let unhealthy = (present - ready).clamp(0, may_go.max(0));
            if unhealthy > 0 {
                self.resize(i, present - unhealthy);
                may_go -= unhealthy;
                changed = true;
            }
        }
        let mut spare = self.sets.iter().map(available).sum::<i32>() - least;
        for &i in &old {
            if spare <= 0 {
                break;
            }
            let present = size(&self.sets[i]);
            let fewer = present.min(spare);
            if fewer > 0 {
                self.resize(i, present - fewer);
                spare -= fewer;
                changed = true;
            }
        }
        changed
    }

    /// Takes all pods from old sets; whether there were any.
    pub(crate) fn empty_old(&mut self) -> bool {
        let mut changed = false;
        for i in self.old() {
            if size(&self.sets[i]) > 0 {
                self.resize(i, 0);
                changed = true;
            }
        }
        changed
    }

    /// Whether the Deployment's size changed since its sets were last scaled.
    pub(crate) fn was_resized(&self) -> bool {
        self.sets.iter().filter(|set| size(set) > 0).any(|set| {
            revision::number(set, DESIRED_REPLICAS)
                .is_some_and(|desired| desired != i64::from(self.wanted))
        })
    }

    /// Follows a change of the Deployment's size without going on with the update: each set gets
    /// its share of what comes or goes, in proportion to its size.
    pub(crate) fn scale_in_proportion(&mut self, recreate: bool, status_replicas: i32) {
        let active: Vec<usize> =
            (0..self.sets.len()).filter(|i| size(&self.sets[*i]) > 0).collect();
        let only = match active.as_slice() {
            [] => self.newest.or_else(|| self.old().last().copied()),
            [only] => Some(*only),
            _ => None,
        };
        if let Some(only) = only {
            if size(&self.sets[only]) != self.wanted {
                self.resize(only, self.wanted);
            } else {
                let (wanted, most) = (self.wanted, self.wanted + self.surge);
                revision::note_sizes(&mut self.sets[only], wanted, most);
            }
            return;
        }
        if self.newest.is_some_and(|newest| self.is_saturated(newest)) {
            self.empty_old();
            return;
        }
        if !recreate {
            self.share_out(active, status_replicas);
        }
    }

    /// Whether a set alone gives all that is wanted.
    fn is_saturated(&self, index: usize) -> bool {
        let set = &self.sets[index];
        let desired = revision::number(set, DESIRED_REPLICAS);
        size(set) == self.wanted
            && desired == Some(i64::from(self.wanted))
            && available(set) == self.wanted
    }

    fn share_out(&mut self, mut active: Vec<usize>, status_replicas: i32) {
        let allowed = if self.wanted > 0 { self.wanted + self.surge } else { 0 };
        let to_add = allowed - active.iter().map(|i| size(&self.sets[*i])).sum::<i32>();
        // Growing favours the larger, then the newer; shrinking the larger, then the older.
        active.sort_by_cached_key(|i| (-size(&self.sets[*i]), revision::age_key(&self.sets[*i])));
        if to_add > 0 {
            active.reverse();
            active.sort_by_key(|i| -size(&self.sets[*i]));
        }
        let mut added = 0;
        let mut sizes = Vec::new();
        for &i in &active {
            let present = size(&self.sets[i]);
            let share = if to_add == 0 {
                0
            } else {
                let share = self.share(&self.sets[i], status_replicas);
                let left = to_add - added;
                if to_add > 0 { share.min(left) } else { share.max(left) }
            };
            added += share;
            sizes.push((i, present + share));
        }
        if let Some((_, first)) = sizes.first_mut() {
            *first = (*first + to_add - added).max(0);
        }
        for (i, to) in sizes {
            self.resize(i, to);
        }
    }

    /// By how many pods a set would grow if all grew alike.
    fn share(&self, set: &ReplicaSet, status_replicas: i32) -> i32 {
        let present = size(set);
        if self.wanted == 0 {
            return -present;
        }
        let before = revision::number(set, MAX_REPLICAS)
            .filter(|max| *max > 0)
            .unwrap_or(i64::from(status_replicas));
        if before <= 0 {
            return 0;
        }
        let grown = f64::from(present) * f64::from(self.wanted + self.surge) / before as f64;
        grown.round() as i32 - present
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn set(name: &str, size: i32, available: i32, annotated: Option<(i32, i32)>) -> ReplicaSet {
        let mut set: ReplicaSet = serde_json::from_value(json!({
            "metadata": {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"replicas": size, "selector": {}},
            "status": {"replicas": size, "availableReplicas": available},
        }))
        .unwrap();
        if let Some((desired, max)) = annotated {
            revision::note_sizes(&mut set, desired, max);
        }
        set
    }

    fn deployment(replicas: i32, strategy: Value) -> Deployment {
        serde_json::from_value(json!({"metadata": {}, "spec": {"replicas": replicas,
            "selector": {}, "template": {}, "strategy": strategy}}))
        .unwrap()
    }

    #[test]
    fn shares_are_rounded_as_documented() {
        let rolling = |surge: Value, unavailable: Value| {
            json!({"type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}})
        };
        let table = [
            (10, rolling(json!("25%"), json!("25%")), (3, 2)),
            (1, rolling(json!("25%"), json!("25%")), (1, 0)),
            (3, rolling(json!(1), json!(0)), (1, 0)),
            // Both would be 0: one pod may be missing.
            (3, rolling(json!(0), json!("10%")), (0, 1)),
            (3, json!({"type": "Recreate"}), (0, 0)),
        ];
        for (replicas, strategy, expected) in table {
            assert_eq!(bounds(&deployment(replicas, strategy.clone())), expected, "{strategy}");
        }
    }

    fn rollout(sets: Vec<ReplicaSet>, wanted: i32, surge: i32, unavailable: i32) -> Rollout {
        let newest = Some(sets.len() - 1);
        Rollout { sets, newest, wanted, surge, unavailable }
    }

    fn sizes(rollout: &Rollout) -> Vec<i32> {
        rollout.sets.iter().map(size).collect()
    }

    #[test]
    fn an_update_goes_on_as_pods_become_available() {
        // Nothing may be missing, one may be too many.
        let mut model = rollout(vec![set("a", 3, 3, None), set("b", 0, 0, None)], 3, 1, 0);
        assert!(model.scale_newest(false));
        assert_eq!(sizes(&model), [3, 1]);
        assert!(!model.scale_newest(false));
        // The new pod is not available: no old one may go.
        assert!(!model.scale_down_old());
        model.sets[1] = set("b", 1, 1, None);
        assert!(model.scale_down_old());
        assert_eq!(sizes(&model), [2, 1]);
    }

    #[test]
    fn pods_that_never_became_available_go_first() {
        let mut model = rollout(
            vec![set("a", 3, 3, None), set("broken", 2, 0, None), set("c", 0, 0, None)],
            4,
            1,
            1,
        );
        assert!(model.scale_down_old());
        assert_eq!(sizes(&model), [3, 0, 0]);
    }

    #[test]
    fn a_resize_in_the_middle_is_shared_in_proportion() {
        // The example of the documentation: 10 wanted, surge 3, sets of 8 and 5; 15 wanted.
        let mut model = rollout(
            vec![set("old", 8, 8, Some((10, 13))), set("new", 5, 0, Some((10, 13)))],
            15,
            3,
            2,
        );
        assert!(model.was_resized());
        model.scale_in_proportion(false, 13);
        assert_eq!(sizes(&model), [11, 7]);
        assert!(!model.was_resized());
        // And down to nothing.
        model.wanted = 0;
        model.scale_in_proportion(false, 18);
        assert_eq!(sizes(&model), [0, 0]);
    }
}
