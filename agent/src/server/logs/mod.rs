//! Container logs as clients see them: a file in the CRI log format, read from where it is asked
//! for, and followed while the container runs.
//!
//! * `line`: one line of the format, and what of it is shown (pure).
//! * `answer`: which log is meant, and the answer that carries it.
//! * `follow`: reading a file that grows and is rotated.

mod answer;
mod follow;
mod line;

use std::path::PathBuf;

use jiff::{SignedDuration, Timestamp};

use follow::follow;

pub(super) use answer::container_logs;

use super::path::is_set;

/// What of a log is wanted (`PodLogOptions`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LogOptions {
    pub(super) follow: bool,
    pub(super) timestamps: bool,
    pub(super) previous: bool,
    pub(super) tail_lines: Option<u64>,
    pub(super) since: Option<Timestamp>,
    pub(super) limit_bytes: Option<u64>,
    /// `Stdout` or `Stderr`; both if absent.
    pub(super) stream: Option<Stream>,
}

/// Where a line was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

/// A log file, and whether it may still grow.
#[derive(Clone, Debug)]
pub(super) struct LogFile {
    pub(super) path: PathBuf,
}

impl LogOptions {
    /// Reads a query.
    ///
    /// # Errors
    /// Names the parameter that is wrong, as the kubelet does.
    pub(super) fn parse(query: &[(String, String)], now: Timestamp) -> Result<Self, String> {
        let get =
            |name: &str| query.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
        let number = |name: &str, least: u64| match get(name) {
            None | Some("") => Ok(None),
            Some(text) => match text.parse::<u64>() {
                Ok(number) if number >= least => Ok(Some(number)),
                _ => Err(format!("{name}: {text:?} must be a whole number of at least {least}")),
            },
        };
        let since = match (number("sinceSeconds", 1)?, get("sinceTime").filter(|t| !t.is_empty())) {
            (Some(_), Some(_)) => {
                return Err(
                    "at most one of `sinceTime` or `sinceSeconds` may be specified".to_owned()
                );
            }
            (Some(seconds), None) => {
                let ago = SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX));
                Some(now.checked_sub(ago).unwrap_or(Timestamp::MIN))
            }
            (None, Some(text)) => {
                Some(text.parse().map_err(|error| format!("sinceTime: {text:?}: {error}"))?)
            }
            (None, None) => None,
        };
        let stream = match get("stream") {
            None | Some("" | "All") => None,
            Some("Stdout") => Some(Stream::Stdout),
            Some("Stderr") => Some(Stream::Stderr),
            Some(other) => {
                return Err(format!("stream: {other:?} must be one of All, Stdout, Stderr"));
            }
        };
        Ok(Self {
            follow: is_set(query, &["follow"]),
            timestamps: is_set(query, &["timestamps"]),
            previous: is_set(query, &["previous"]),
            tail_lines: number("tailLines", 0)?,
            since,
            limit_bytes: number("limitBytes", 1)?,
            stream,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<LogOptions, String> {
        LogOptions::parse(&super::super::path::query(Some(text)), Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn options_are_read_and_checked() {
        let options =
            parse("follow=true&tailLines=5&limitBytes=10&timestamps=1&stream=Stderr").unwrap();
        assert!(options.follow && options.timestamps);
        assert_eq!((options.tail_lines, options.limit_bytes), (Some(5), Some(10)));
        assert_eq!(options.stream, Some(Stream::Stderr));
        for bad in [
            "tailLines=-1",
            "limitBytes=0",
            "sinceSeconds=0",
            "sinceTime=x",
            "stream=x",
            "sinceSeconds=1&sinceTime=2026-01-01T00:00:00Z",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
