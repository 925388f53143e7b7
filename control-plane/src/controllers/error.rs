//! What can go wrong in a controller's pass.

use super::queue::Retry;

/// A pass over one object ended early; it is tried again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControllerError {
    /// The API server refused, or could not be asked.
    #[error("{doing}: {source}")]
    Api {
        /// What was being done, to what.
        doing: String,
        /// Why not.
        #[source]
        source: Box<kube::Error>,
    },
    /// The object can't be worked on as it is; the message says what to change.
    #[error("{0}")]
    Object(String),
}

impl ControllerError {
    /// The HTTP code of the API server's answer, or 0.
    pub(crate) fn code(&self) -> u16 {
        match self {
            Self::Api { source, .. } => code(source),
            Self::Object(_) => 0,
        }
    }
}

/// The HTTP code of an API server's answer, or 0 if there was none.
pub(crate) fn code(error: &kube::Error) -> u16 {
    match error {
        kube::Error::Api(status) => status.code,
        _ => 0,
    }
}

impl Retry for ControllerError {
    fn is_ordinary(&self) -> bool {
        // Gone meanwhile, or changed by somebody else, or there already.
        matches!(self.code(), 404 | 409)
    }
}

/// Says what was being done when an API call failed.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, ControllerError>;
}

impl<T> Doing<T> for Result<T, kube::Error> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, ControllerError> {
        self.map_err(|source| ControllerError::Api { doing: what(), source: Box::new(source) })
    }
}
