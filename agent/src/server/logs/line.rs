//! One line of the CRI log format: `<RFC 3339 time> <stream> <tags> <text>`.
//!
//! The tag `P` says that the line goes on in the next entry, `F` that it ends here.

use jiff::Timestamp;

use super::{LogOptions, Stream};

/// An entry, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    pub(super) time: &'a str,
    pub(super) stream: Stream,
    pub(super) partial: bool,
    pub(super) text: &'a [u8],
}

/// Reads an entry without its line break; none if it is not in the format.
pub(super) fn parse(line: &[u8]) -> Option<Entry<'_>> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let time = std::str::from_utf8(parts.next()?).ok()?;
    let stream = match parts.next()? {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    let partial = match parts.next()?.split(|byte| *byte == b':').next()? {
        b"P" => true,
        b"F" => false,
        _ => return None,
    };
    Some(Entry { time, stream, partial, text: parts.next().unwrap_or_default() })
}

/// Shows entries one after another, as the options want them.
pub(super) struct Show {
    options: LogOptions,
    left: Option<u64>,
    /// Whether the last entry shown of each stream was a part of a line.
    in_line: [bool; 2],
}

impl Show {
    pub(super) fn new(options: &LogOptions) -> Self {
        Self { options: options.clone(), left: options.limit_bytes, in_line: [false; 2] }
    }

    /// Whether nothing more will be shown.
    pub(super) fn is_done(&self) -> bool {
        self.left == Some(0)
    }

    /// What a client sees of an entry.
    pub(super) fn shown(&mut self, line: &[u8]) -> Vec<u8> {
        let Some(entry) = parse(line) else {
            tracing::warn!(line = %String::from_utf8_lossy(&line[..line.len().min(80)]), "not a log entry");
            return Vec::new();
        };
        if self.options.stream.is_some_and(|wanted| wanted != entry.stream)
            || self.is_before(&entry)
        {
            return Vec::new();
        }
        let in_line = &mut self.in_line[usize::from(entry.stream == Stream::Stderr)];
        let mut out = Vec::with_capacity(entry.text.len() + 40);
        if self.options.timestamps && !*in_line {
            out.extend_from_slice(entry.time.as_bytes());
            out.push(b' ');
        }
        *in_line = entry.partial;
        out.extend_from_slice(entry.text);
        if !entry.partial {
            out.push(b'\n');
        }
        if let Some(left) = &mut self.left {
            out.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= out.len() as u64;
        }
        out
    }

    fn is_before(&self, entry: &Entry<'_>) -> bool {
        let Some(since) = self.options.since else { return false };
        entry.time.parse::<Timestamp>().is_ok_and(|time| time < since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(options: &LogOptions, lines: &[&str]) -> String {
        let mut show = Show::new(options);
        let bytes: Vec<u8> = lines.iter().flat_map(|line| show.shown(line.as_bytes())).collect();
        String::from_utf8(bytes).unwrap()
    }

    const LINES: [&str; 4] = [
        "2026-01-01T00:00:00.5Z stdout P one ",
        "2026-01-01T00:00:01Z stdout F two",
        "2026-01-01T00:00:02Z stderr F  bad",
        "2026-01-01T00:00:03Z stdout F",
    ];

    #[test]
    fn entries_are_put_together() {
        let options = LogOptions::default();
        assert_eq!(shown(&options, &LINES), "one two\n bad\n\n");
        let options = LogOptions { timestamps: true, ..LogOptions::default() };
        assert_eq!(shown(&options, &LINES[..2]), "2026-01-01T00:00:00.5Z one two\n");
        let options = LogOptions { stream: Some(Stream::Stderr), ..LogOptions::default() };
        assert_eq!(shown(&options, &LINES), " bad\n");
        let since = Some("2026-01-01T00:00:02Z".parse().unwrap());
        let options = LogOptions { since, ..LogOptions::default() };
        assert_eq!(shown(&options, &LINES), " bad\n\n");
        let options = LogOptions { limit_bytes: Some(5), ..LogOptions::default() };
        assert_eq!(shown(&options, &LINES), "one t");
    }

    #[test]
    fn what_is_not_an_entry_is_left_out() {
        assert_eq!(shown(&LogOptions::default(), &["", "x", "t out F x", "t stdout Q x"]), "");
    }
}
