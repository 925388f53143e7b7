//! What the program says while it runs.

use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people and the journal.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Log lines can't be set up.
#[derive(Debug, thiserror::Error)]
#[error("log filter {filter:?}: {reason}")]
pub struct LoggingError {
    filter: String,
    reason: String,
}

/// Starts logging to standard error for the whole process.
///
/// `filter` is a level or a list such as `info,keelson_proxy=debug`. Time stamps are left out when
/// standard error goes to the journal, which has its own.
///
/// # Errors
/// When the filter can't be parsed, or logging was started before.
pub fn init(filter: &str, format: Format) -> Result<(), LoggingError> {
    let error = |reason: String| LoggingError { filter: filter.to_owned(), reason };
    let filter = EnvFilter::try_new(filter).map_err(|e| error(e.to_string()))?;
    let registry = tracing_subscriber::registry().with(filter);
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let result = match (format, journal) {
        (Format::Json, _) => {
            registry.with(fmt::layer().json().with_writer(std::io::stderr)).try_init()
        }
        (Format::Text, true) => registry
            .with(fmt::layer().without_time().with_ansi(false).with_writer(std::io::stderr))
            .try_init(),
        (Format::Text, false) => registry
            .with(
                fmt::layer()
                    .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
                    .with_writer(std::io::stderr),
            )
            .try_init(),
    };
    result.map_err(|e| error(e.to_string()))
}
