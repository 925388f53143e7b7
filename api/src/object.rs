//! Keys, owner references and object references.

use std::fmt;

use k8s_openapi::{
    api::core::v1::ObjectReference,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};

/// An object's namespace and name; the namespace is empty for objects that have none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Empty if the object is cluster-scoped.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl ObjectKey {
    /// A key of these two parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// The key of an object with this metadata.
    pub fn of(metadata: &ObjectMeta) -> Self {
        Self {
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: metadata.name.clone().unwrap_or_default(),
        }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// The reference by which `owner` controls another object; it blocks the owner's foreground
/// deletion, as Kubernetes' own controllers have it.
pub fn controller_reference<K: k8s_openapi::Resource>(owner: &ObjectMeta) -> OwnerReference {
    OwnerReference {
        api_version: K::API_VERSION.to_owned(),
        kind: K::KIND.to_owned(),
        name: owner.name.clone().unwrap_or_default(),
        uid: owner.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// The owner that controls an object, if one does.
pub fn controller_of(metadata: &ObjectMeta) -> Option<&OwnerReference> {
    metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))
}

/// Whether `owner` (by UID) controls the object.
pub fn is_controlled_by(metadata: &ObjectMeta, owner: &ObjectMeta) -> bool {
    controller_of(metadata).is_some_and(|o| Some(o.uid.as_str()) == owner.uid.as_deref())
}

/// A reference to an object, as events carry it.
pub fn object_reference<K>(object: &K) -> ObjectReference
where
    K: k8s_openapi::Metadata<Ty = ObjectMeta>,
{
    let metadata = object.metadata();
    ObjectReference {
        api_version: Some(K::API_VERSION.to_owned()),
        kind: Some(K::KIND.to_owned()),
        namespace: metadata.namespace.clone(),
        name: metadata.name.clone(),
        uid: metadata.uid.clone(),
        resource_version: metadata.resource_version.clone(),
        field_path: None,
    }
}

/// A reference to an object of which no more than this is known, as events carry it.
pub fn reference_by_key<K: k8s_openapi::Resource>(
    key: &ObjectKey,
    uid: Option<String>,
) -> ObjectReference {
    ObjectReference {
        api_version: Some(K::API_VERSION.to_owned()),
        kind: Some(K::KIND.to_owned()),
        namespace: Some(key.namespace.clone()).filter(|namespace| !namespace.is_empty()),
        name: Some(key.name.clone()),
        uid,
        ..ObjectReference::default()
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;

    use super::*;

    #[test]
    fn references_name_the_object() {
        let pod = Pod {
            metadata: ObjectMeta {
                namespace: Some("default".into()),
                name: Some("web".into()),
                uid: Some("u".into()),
                ..ObjectMeta::default()
            },
            ..Pod::default()
        };
        let reference = object_reference(&pod);
        assert_eq!(reference.kind.as_deref(), Some("Pod"));
        assert_eq!(reference.api_version.as_deref(), Some("v1"));
        let key = ObjectKey::of(&pod.metadata);
        assert_eq!(key.to_string(), "default/web");
        assert_eq!(reference_by_key::<Pod>(&key, Some("u".into())), reference);
        assert_eq!(reference_by_key::<Pod>(&ObjectKey::new("", "n"), None).namespace, None);

        let owned = ObjectMeta {
            owner_references: Some(vec![controller_reference::<Pod>(&pod.metadata)]),
            ..ObjectMeta::default()
        };
        assert!(is_controlled_by(&owned, &pod.metadata));
        assert!(!is_controlled_by(&pod.metadata, &pod.metadata));
    }
}
