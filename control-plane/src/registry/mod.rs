//! One row for each resource that is served: its names, its verbs, and the rules of its kind.
//!
//! The handlers of the API server know no kind. Whatever differs between a pod and a lease is in
//! its row: how a body is decoded, what is filled in, what the server sets, what is refused, which
//! field selectors there are, which columns are printed. All of it is pure: objects are JSON, the
//! clock is an argument, nothing is read or written elsewhere.
//!
//! The life of a written object:
//!
//! ```text
//! body ─ decode ─ default ─ prepare_create / prepare_update ─ (admission) ─ validate ─ store
//!        types    values    what the server owns                            422 with causes
//! ```

mod decode;
mod kinds;
mod meta;
pub(crate) mod path;
mod rows;
pub mod scale;
mod strategy;
pub(crate) mod value;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, LazyLock},
};

use jiff::Timestamp;
use serde_json::Value;

pub(crate) use self::strategy::Strategy;
pub use self::{
    decode::{Decoded, FieldValidation},
    kinds::pod::bind as bind_pod,
    meta::{generate_name, timestamp},
};
use crate::status::{FieldError, Status};

/// Under what objects are stored: versions of one kind share it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StorageKey {
    /// API group of the stored form.
    pub group: String,
    /// Plural name.
    pub plural: String,
}

/// Something under an object's own path (`pods/log`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subresource {
    /// Its name in the path.
    pub name: &'static str,
    /// API group of the kind that it takes and gives; empty for the core group and where it is the
    /// resource's own.
    pub group: &'static str,
    /// API version of that kind; empty where it is the resource's own.
    pub version: &'static str,
    /// The kind.
    pub kind: &'static str,
    /// What may be done.
    pub verbs: &'static [&'static str],
}

/// A resource in one API version.
#[derive(Debug)]
pub struct Resource {
    /// API group; empty for the core group.
    pub group: String,
    /// API version.
    pub version: String,
    /// Kind of an object.
    pub kind: String,
    /// Kind of a list of them.
    pub list_kind: String,
    /// Name in paths.
    pub plural: String,
    /// Name of one, for people.
    pub singular: String,
    /// Names that kubectl takes as well.
    pub short_names: Vec<String>,
    /// Groups of resources that kubectl takes as one (`all`).
    pub categories: Vec<String>,
    /// Whether objects live in namespaces.
    pub namespaced: bool,
    /// What may be done, in the order of discovery.
    pub verbs: Vec<&'static str>,
    /// What is under an object's path.
    pub subresources: Vec<Subresource>,
    /// Where objects are stored.
    pub storage: StorageKey,
    /// Only `create`, answered at once and never stored (reviews).
    pub virtual_only: bool,
    /// Whether `metadata.generation` counts the changes of what is asked for.
    pub(crate) has_generation: bool,
    /// The kind's rules.
    pub(crate) strategy: &'static Strategy,
}

/// What is known of a create besides its body.
#[derive(Clone, Copy, Debug)]
pub struct CreateContext<'a> {
    /// Namespace of the path; empty for resources without.
    pub namespace: &'a str,
    /// Name of the path, where there is one (a patch that creates).
    pub name: Option<&'a str>,
    /// Present time.
    pub now: Timestamp,
}

impl Resource {
    /// `group/version`, or the version alone in the core group.
    pub fn api_version(&self) -> Cow<'_, str> {
        if self.group.is_empty() {
            Cow::Borrowed(&self.version)
        } else {
            Cow::Owned(format!("{}/{}", self.group, self.version))
        }
    }

    /// What may be done to a subresource, or `None` if there is no such.
    pub fn subresource(&self, name: &str) -> Option<&Subresource> {
        self.subresources.iter().find(|s| s.name == name)
    }

    /// Whether it has `status`.
    pub fn has_status(&self) -> bool {
        self.subresource("status").is_some()
    }

    /// Whether it has `scale`.
    pub fn has_scale(&self) -> bool {
        self.subresource("scale").is_some()
    }

    /// Whether an update of an object that is not there creates it.
    pub(crate) fn creates_on_update(&self) -> bool {
        self.strategy.create_on_update
    }

    /// Whether a verb is served on the resource itself.
    pub fn allows(&self, verb: &str) -> bool {
        self.verbs.contains(&verb)
    }

    /// Checks a body against the kind and its schema, and gives it `apiVersion` and `kind` if it
    /// came without.
    ///
    /// # Errors
    /// 400 if it is no object of this kind, if a field has the wrong type, or, with
    /// [`FieldValidation::Strict`], if it has a field that does not exist.
    pub fn decode(&self, body: Value, validation: FieldValidation) -> Result<Decoded, Status> {
        decode::decode(self, body, Vec::new(), validation)
    }

    /// The same from the bytes of a JSON document, where duplicate fields can be seen.
    ///
    /// # Errors
    /// As [`Self::decode`]; also 400 if it is not JSON or nested too deep.
    pub fn decode_bytes(
        &self,
        body: &[u8],
        validation: FieldValidation,
    ) -> Result<Decoded, Status> {
        decode::decode_bytes(self, body, validation)
    }

    /// Fills in what Kubernetes documents as defaults.
    pub fn default(&self, object: &mut Value) {
        (self.strategy.default)(object);
    }

    /// Sets what the server owns in a new object.
    ///
    /// # Errors
    /// 400 if name, namespace or resource version contradict the request.
    pub fn prepare_create(
        &self,
        object: &mut Value,
        context: &CreateContext<'_>,
    ) -> Result<(), Status> {
        meta::prepare_create(self, object, context)?;
        (self.strategy.prepare_create)(object);
        Ok(())
    }

    /// Keeps what an update may not touch as it was, silently where Kubernetes does so:
    /// metadata of the server's, `status` in an update of the object, all but `status` in an
    /// update of that.
    ///
    /// # Errors
    /// 400 if the name contradicts the old one, 409 if the UID does.
    pub fn prepare_update(
        &self,
        new: &mut Value,
        old: &Value,
        subresource: &str,
    ) -> Result<(), Status> {
        meta::prepare_update(self, new, old)?;
        strategy::split_status(self, new, old, subresource);
        (self.strategy.prepare_update)(new, old, subresource);
        // That a pod is placed asks for nothing that was not asked for.
        if self.has_generation && subresource != "binding" && strategy::asks_for_new_work(new, old)
        {
            meta::bump_generation(new, old);
        }
        Ok(())
    }

    /// What is wrong with an object; with `old`, also what may not change. Empty if all is well;
    /// otherwise make a status with [`Self::invalid`].
    pub fn validate(&self, new: &Value, old: Option<&Value>, subresource: &str) -> Vec<FieldError> {
        let mut errors = Vec::new();
        kinds::metadata::validate(self, new, old, &mut errors);
        (self.strategy.validate)(new, old, subresource, &mut errors);
        errors
    }

    /// 422 for an object of this kind.
    pub fn invalid(&self, object: &Value, errors: &[FieldError]) -> Status {
        let name = value::text(object, &["metadata", "name"]);
        let name =
            if name.is_empty() { value::text(object, &["metadata", "generateName"]) } else { name };
        Status::invalid(&self.group, &self.kind, name, errors)
    }

    /// Whether a field selector may name this field.
    pub fn supports_field(&self, field: &str) -> bool {
        self.field_label(field).is_some()
    }

    /// The value that a field selector compares; `None` if it may not name this field (400, see
    /// [`Self::unsupported_field`]).
    pub fn field_value(&self, object: &Value, field: &str) -> Option<String> {
        self.field_label(field).map(|read| read(object))
    }

    fn field_label(&self, field: &str) -> Option<fn(&Value) -> String> {
        match field {
            "metadata.name" => return Some(|o| value::text(o, &["metadata", "name"]).to_owned()),
            "metadata.namespace" if self.namespaced => {
                return Some(|o| value::text(o, &["metadata", "namespace"]).to_owned());
            }
            _ => {}
        }
        self.strategy.fields.iter().find(|(name, _)| *name == field).map(|(_, read)| *read)
    }

    /// 400 for a field selector on a field that can't be selected by.
    pub fn unsupported_field(&self, labels: &str, fields: &str, field: &str) -> Status {
        let version = if self.group.is_empty() {
            format!("/{}", self.version)
        } else {
            self.api_version().into_owned()
        };
        Status::bad_request(format!(
            "Unable to find {version:?} that match label selector {labels:?}, field selector \
             {fields:?}: field label not supported: {field}",
            version = format!("{version}, Resource={}", self.plural),
        ))
    }

    /// A stored object in this version.
    pub fn convert(&self, stored: &Arc<Value>) -> Arc<Value> {
        match self.strategy.from_stored {
            Some(from_stored) => Arc::new(from_stored(stored)),
            None => Arc::clone(stored),
        }
    }

    /// An object of this version in the form that is stored.
    pub fn to_stored(&self, object: Value) -> Value {
        match self.strategy.to_stored {
            Some(to_stored) => to_stored(&object),
            None => object,
        }
    }
}

/// All resources that are served.
#[derive(Debug)]
pub struct Registry {
    by_name: BTreeMap<(String, String, String), Arc<Resource>>,
}

static BUILTIN: LazyLock<Arc<Registry>> = LazyLock::new(|| {
    let by_name = rows::all()
        .into_iter()
        .map(|row| ((row.group.clone(), row.version.clone(), row.plural.clone()), Arc::new(row)))
        .collect();
    Arc::new(Registry { by_name })
});

impl Registry {
    /// The resources that come with the API server.
    pub fn builtin() -> Arc<Self> {
        Arc::clone(&BUILTIN)
    }

    /// The resource at a path.
    pub fn resource(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Resource>> {
        // Few rows: walking them costs less than building an owned key.
        self.by_name
            .values()
            .find(|r| r.plural == plural && r.version == version && r.group == group)
    }

    /// The resource of a kind.
    pub fn kind(&self, group: &str, version: &str, kind: &str) -> Option<&Arc<Resource>> {
        self.by_name.values().find(|r| r.kind == kind && r.version == version && r.group == group)
    }

    /// All resources, by group, version and plural name.
    pub fn resources(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.by_name.values()
    }

    /// What is stored: for each storage the resource in whose version it is.
    pub fn stored(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.by_name.values().filter(|r| !r.virtual_only && r.storage.group == r.group)
    }
}
