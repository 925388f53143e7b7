//! What pods refer to: ConfigMaps, Secrets, Services and tokens, wherever they come from.

use std::{collections::BTreeMap, fmt, sync::Arc};

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service};
use tokio::sync::watch;

/// Which kind of object holds data by key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DataKind {
    /// A ConfigMap.
    ConfigMap,
    /// A Secret.
    Secret,
}

impl DataKind {
    /// The kind as manifests write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ConfigMap => "ConfigMap",
            Self::Secret => "Secret",
        }
    }
}

/// A ConfigMap or Secret, by name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DataName {
    /// Which kind.
    pub kind: DataKind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl fmt::Display for DataName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind.as_str(), self.namespace, self.name)
    }
}

/// What a ConfigMap or Secret holds.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Data {
    /// `data`: of a ConfigMap text, of a Secret bytes.
    pub values: BTreeMap<String, Vec<u8>>,
    /// `binaryData` of a ConfigMap: for files, not for variables.
    pub binary: BTreeMap<String, Vec<u8>>,
    /// It will never change, so nobody needs to watch it.
    pub immutable: bool,
}

impl fmt::Debug for Data {
    // Secrets must not end up in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys: Vec<&String> = self.values.keys().chain(self.binary.keys()).collect();
        f.debug_struct("Data").field("keys", &keys).finish_non_exhaustive()
    }
}

impl Data {
    /// The value of a key, text or binary, as a file has it.
    pub fn get(&self, key: &str) -> Option<&Vec<u8>> {
        self.values.get(key).or_else(|| self.binary.get(key))
    }
}

impl From<ConfigMap> for Data {
    fn from(object: ConfigMap) -> Self {
        let text = object.data.unwrap_or_default();
        let binary = object.binary_data.unwrap_or_default();
        Self {
            values: text.into_iter().map(|(key, value)| (key, value.into_bytes())).collect(),
            binary: binary.into_iter().map(|(key, value)| (key, value.0)).collect(),
            immutable: object.immutable.unwrap_or(false),
        }
    }
}

impl From<Secret> for Data {
    fn from(object: Secret) -> Self {
        let values = object.data.unwrap_or_default();
        Self {
            values: values.into_iter().map(|(key, value)| (key, value.0)).collect(),
            binary: BTreeMap::new(),
            immutable: object.immutable.unwrap_or(false),
        }
    }
}

/// Why an object can't be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// It is not there. (The kubelet's own words: events and scripts look for them.)
    #[error("{} {:?} not found", .0.kind.as_str().to_lowercase(), .0.name)]
    NotFound(DataName),
    /// The API server refused to say.
    #[error("{0}")]
    Refused(String),
    /// The API server could not be asked; what was known before may still do.
    #[error("{0}")]
    Unreachable(String),
    /// This node has no API server, so its pods can't refer to objects of one.
    #[error(
        "{0}: this node runs without an API server: only pods of manifests without references \
             to API objects can run here"
    )]
    NoApi(String),
}

/// A watched object, as it is known now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Watched {
    /// Not known yet.
    Pending,
    /// It is there.
    Present(Arc<Data>),
    /// It is not there, or it can't be had.
    Missing(ObjectError),
}

/// Whom a token is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenWish {
    /// The pod's namespace.
    pub namespace: String,
    /// The service account's name.
    pub service_account: String,
    /// The pod that the token is bound to: its name and UID.
    pub pod: (String, String),
    /// Who shall accept it; the API server itself if empty.
    pub audience: String,
    /// How long it shall be good for, in seconds.
    pub expiration_seconds: i64,
}

/// A token of a service account.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// What a program shows.
    pub token: String,
    /// Until when it is good.
    pub expires: Timestamp,
}

impl fmt::Debug for Token {
    // Tokens must not end up in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("expires", &self.expires).finish_non_exhaustive()
    }
}

/// Where the objects that pods refer to come from.
#[async_trait]
pub trait ObjectSource: Send + Sync + 'static {
    /// A ConfigMap or Secret as it is now; as it last was, if the API server can't be reached.
    async fn data(&self, object: &DataName) -> Result<Arc<Data>, ObjectError>;
    /// A ConfigMap or Secret from now on, for as long as the receiver is kept.
    fn watch(&self, object: &DataName) -> watch::Receiver<Watched>;
    /// All Services.
    async fn services(&self) -> Result<Vec<Arc<Service>>, ObjectError>;
    /// A new token.
    async fn token(&self, wish: &TokenWish) -> Result<Token, ObjectError>;
}
