//! What a container's environment is, from objects at hand: pure.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use k8s_openapi::api::core::v1::{Container, EnvVar, EnvVarSource, Pod};

use super::{
    PodAddresses,
    downward::{self, Allocatable, Place},
    expand::expand,
    objects::{Data, DataKind, DataName},
};

/// Variables in order, and what could not become one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// Names and values; no name twice.
    pub variables: Vec<(String, String)>,
    /// Keys of `envFrom` objects that are no names of variables, with the object they are of.
    pub skipped: Vec<(DataName, String)>,
}

/// The objects that `env` and `envFrom` refer to.
pub(crate) fn needed(pod: &Pod, container: &Container) -> Vec<DataName> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let named = |kind, name: &str| object_name(kind, namespace, name);
    let mut needed = BTreeSet::new();
    for from in container.env_from.iter().flatten() {
        if let Some(source) = &from.config_map_ref {
            needed.insert(named(DataKind::ConfigMap, &source.name));
        }
        if let Some(source) = &from.secret_ref {
            needed.insert(named(DataKind::Secret, &source.name));
        }
    }
    for source in container.env.iter().flatten().filter_map(|env| env.value_from.as_ref()) {
        if let Some(key) = &source.config_map_key_ref {
            needed.insert(named(DataKind::ConfigMap, &key.name));
        }
        if let Some(key) = &source.secret_key_ref {
            needed.insert(named(DataKind::Secret, &key.name));
        }
    }
    needed.into_iter().collect()
}

/// What the plan is made from.
pub(crate) struct Given<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) container: &'a Container,
    pub(crate) addresses: &'a PodAddresses,
    /// Variables of Services.
    pub(crate) services: BTreeMap<String, String>,
    /// The objects of [`needed`] that are there.
    pub(crate) objects: &'a HashMap<DataName, Arc<Data>>,
    pub(crate) allocatable: &'a Allocatable,
}

/// The variables: those of Services first, then `envFrom`, then `env`; a later one replaces an
/// earlier one of the same name.
///
/// # Errors
/// The message for the waiting reason `CreateContainerConfigError`.
pub(crate) fn plan(given: &Given<'_>) -> Result<Environment, String> {
    let mut variables = Variables::default();
    let mut skipped = Vec::new();
    for (name, value) in &given.services {
        variables.set(name, value.clone());
    }
    let namespace = given.pod.metadata.namespace.as_deref().unwrap_or_default();
    for from in given.container.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        let sources = [
            from.config_map_ref.as_ref().map(|s| (DataKind::ConfigMap, &s.name, s.optional)),
            from.secret_ref.as_ref().map(|s| (DataKind::Secret, &s.name, s.optional)),
        ];
        for (kind, name, optional) in sources.into_iter().flatten() {
            let object = object_name(kind, namespace, name);
            let Some(data) = lookup(given, &object, optional)? else { continue };
            for (key, value) in &data.values {
                let name = format!("{prefix}{key}");
                if is_variable_name(&name) {
                    variables.set(&name, text(value));
                } else {
                    skipped.push((object.clone(), key.clone()));
                }
            }
        }
    }
    for env in given.container.env.iter().flatten() {
        let value = match (env.value.as_deref().unwrap_or_default(), &env.value_from) {
            ("", Some(source)) => match value_from(given, env, source)? {
                Some(value) => value,
                None => continue,
            },
            (value, _) => expand(value, |name| variables.get(name)),
        };
        variables.set(&env.name, value);
    }
    Ok(Environment { variables: variables.list, skipped })
}

/// The value of a `valueFrom`; nothing if it is optional and not there.
fn value_from(
    given: &Given<'_>,
    env: &EnvVar,
    source: &EnvVarSource,
) -> Result<Option<String>, String> {
    let namespace = given.pod.metadata.namespace.as_deref().unwrap_or_default();
    if let Some(field) = &source.field_ref {
        return downward::field(given.pod, field, Place::Variable(given.addresses)).map(Some);
    }
    if let Some(resource) = &source.resource_field_ref {
        let container = Some(given.container);
        return downward::resource(given.pod, container, resource, given.allocatable).map(Some);
    }
    let keyed = match (&source.config_map_key_ref, &source.secret_key_ref) {
        (Some(key), _) => (DataKind::ConfigMap, &key.name, &key.key, key.optional),
        (None, Some(key)) => (DataKind::Secret, &key.name, &key.key, key.optional),
        (None, None) if source.file_key_ref.is_some() => {
            return Err(format!(
                "environment variable {}: fileKeyRef is not supported: mount the volume and read \
                 the file, or use a ConfigMap or Secret",
                env.name
            ));
        }
        (None, None) => {
            return Err(format!("environment variable {}: its valueFrom is empty", env.name));
        }
    };
    let (kind, name, key, optional) = keyed;
    let object = object_name(kind, namespace, name);
    let Some(data) = lookup(given, &object, optional)? else { return Ok(None) };
    match data.values.get(key) {
        Some(value) => Ok(Some(text(value))),
        None if optional == Some(true) => Ok(None),
        None => {
            Err(format!("couldn't find key {key} in {} {namespace}/{name}", object.kind.as_str()))
        }
    }
}

fn lookup<'a>(
    given: &'a Given<'_>,
    object: &DataName,
    optional: Option<bool>,
) -> Result<Option<&'a Data>, String> {
    match given.objects.get(object) {
        Some(data) => Ok(Some(data)),
        None if optional == Some(true) => Ok(None),
        None => Err(super::ObjectError::NotFound(object.clone()).to_string()),
    }
}

fn object_name(kind: DataKind, namespace: &str, name: &str) -> DataName {
    DataName { kind, namespace: namespace.to_owned(), name: name.to_owned() }
}

/// A variable's value is text; a Secret may hold what is none.
fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).into_owned()
}

/// Any printable ASCII but `=` (the relaxed rule, general since Kubernetes 1.34).
fn is_variable_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'=')
}

/// Variables in the order of their first setting.
#[derive(Default)]
struct Variables {
    list: Vec<(String, String)>,
    index: HashMap<String, usize>,
}

impl Variables {
    fn set(&mut self, name: &str, value: String) {
        match self.index.get(name) {
            Some(at) => self.list[*at].1 = value,
            None => {
                self.index.insert(name.to_owned(), self.list.len());
                self.list.push((name.to_owned(), value));
            }
        }
    }

    fn get(&self, name: &str) -> Option<String> {
        self.index.get(name).map(|at| self.list[*at].1.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(values: &[(&str, &str)]) -> Arc<Data> {
        let values = values.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec()));
        Arc::new(Data { values: values.collect(), ..Data::default() })
    }

    fn objects() -> HashMap<DataName, Arc<Data>> {
        HashMap::from([
            (object_name(DataKind::ConfigMap, "ns", "conf"), data(&[("A", "a"), ("b.c", "dots")])),
            (object_name(DataKind::Secret, "ns", "keys"), data(&[("A", "secret"), ("é", "x")])),
        ])
    }

    fn planned(container: serde_json::Value) -> Result<Environment, String> {
        let container: Container = serde_json::from_value(container).unwrap();
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "web", "namespace": "ns"},
            "spec": {"containers": []},
        }))
        .unwrap();
        plan(&Given {
            pod: &pod,
            container: &container,
            addresses: &PodAddresses::default(),
            services: BTreeMap::from([("SVC_HOST".to_owned(), "10.0.0.1".to_owned())]),
            objects: &objects(),
            allocatable: &Allocatable::new(),
        })
    }

    fn variables(container: serde_json::Value) -> Vec<(String, String)> {
        planned(container).unwrap().variables
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn later_sources_replace_earlier_ones() {
        let found = variables(serde_json::json!({"name": "c",
        "envFrom": [
            {"configMapRef": {"name": "conf"}},
            {"secretRef": {"name": "keys"}, "prefix": "S_"},
            {"configMapRef": {"name": "none", "optional": true}},
        ],
        "env": [
            {"name": "X", "value": "$(A)-$(SVC_HOST)-$(LATER)-$$(A)"},
            {"name": "LATER", "value": "l"},
            {"name": "A", "value": "mine"},
            {"name": "Y", "value": "$(A)"},
            {"name": "EMPTY"},
            {"name": "SVC_HOST", "value": "other"},
        ]}));
        assert_eq!(
            found,
            pairs(&[
                ("SVC_HOST", "other"),
                ("A", "mine"),
                ("b.c", "dots"),
                ("S_A", "secret"),
                ("X", "a-10.0.0.1-$(LATER)-$(A)"),
                ("LATER", "l"),
                ("Y", "mine"),
                ("EMPTY", ""),
            ])
        );
    }

    #[test]
    fn names_that_are_none_are_skipped_and_told() {
        let found =
            planned(serde_json::json!({"name": "c", "envFrom": [{"secretRef": {"name": "keys"}}]}))
                .unwrap();
        let object = object_name(DataKind::Secret, "ns", "keys");
        assert_eq!(found.skipped, [(object, "é".to_owned())]);
    }

    #[test]
    fn keys_come_from_objects_or_the_reason_is_told() {
        let one = |value_from: serde_json::Value| {
            planned(serde_json::json!({"name": "c",
                "env": [{"name": "V", "valueFrom": value_from}]}))
            .map(|found| found.variables.into_iter().find(|(n, _)| n == "V").map(|(_, v)| v))
        };
        for (value_from, expected) in [
            (serde_json::json!({"configMapKeyRef": {"name": "conf", "key": "A"}}), Ok(Some("a"))),
            (serde_json::json!({"secretKeyRef": {"name": "keys", "key": "A"}}), Ok(Some("secret"))),
            (
                serde_json::json!({"configMapKeyRef": {"name": "conf", "key": "y"}}),
                Err("couldn't find key y in ConfigMap ns/conf"),
            ),
            (
                serde_json::json!({"secretKeyRef": {"name": "keys", "key": "y"}}),
                Err("couldn't find key y in Secret ns/keys"),
            ),
            (
                serde_json::json!({"configMapKeyRef": {"name": "none", "key": "y"}}),
                Err("configmap \"none\" not found"),
            ),
            (
                serde_json::json!({"secretKeyRef": {"name": "none", "key": "y"}}),
                Err("secret \"none\" not found"),
            ),
            (
                serde_json::json!({"secretKeyRef": {"name": "none", "key": "y", "optional": true}}),
                Ok(None),
            ),
            (
                serde_json::json!({"secretKeyRef": {"name": "keys", "key": "y", "optional": true}}),
                Ok(None),
            ),
            (serde_json::json!({"fieldRef": {"fieldPath": "metadata.name"}}), Ok(Some("web"))),
            (
                serde_json::json!({"fileKeyRef": {"volumeName": "v", "path": "p", "key": "k"}}),
                Err("environment variable V: fileKeyRef is not supported: mount the volume and \
                     read the file, or use a ConfigMap or Secret"),
            ),
        ] {
            let found = one(value_from);
            let found = found.as_ref().map(|v| v.as_deref()).map_err(String::as_str);
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn every_reference_is_needed_once() {
        let container: Container = serde_json::from_value(serde_json::json!({"name": "c",
            "envFrom": [{"configMapRef": {"name": "conf"}}, {"configMapRef": {"name": "conf"}}],
            "env": [{"name": "V", "valueFrom": {"secretKeyRef": {"name": "k", "key": "x",
                "optional": true}}}]}))
        .unwrap();
        let found = needed(&Pod::default(), &container);
        let found: Vec<_> = found.iter().map(|n| (n.kind, n.name.as_str())).collect();
        assert_eq!(found, [(DataKind::ConfigMap, "conf"), (DataKind::Secret, "k")]);
    }
}
