//! What can go wrong in a controller's pass.

use super::queue::Retry;

/// A pass over one object ended early; it is tried again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControllerError {
    /// The API server refused, or could not be asked.
    #[error("{doing}: {}", reason(source))]
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

/// What went wrong in the words of the API server, where it answered.
pub(crate) fn reason(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        kube::Error::Api(status) => status.reason.clone(),
        error => error.to_string(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_told_in_the_words_of_the_server() {
        let status = kube::core::Status::failure("pods \"a\" is forbidden: no", "Forbidden");
        let error = kube::Error::Api(Box::new(status.with_code(403)));
        assert_eq!(reason(&error), "pods \"a\" is forbidden: no");
        let told = Err::<(), _>(error).doing(|| "create pod a".to_owned()).unwrap_err();
        assert_eq!(told.to_string(), "create pod a: pods \"a\" is forbidden: no");
    }
}
