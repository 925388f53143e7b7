//! A container's log file, in the format of the container runtime interface.
//!
//! Each line is `<time> <stream> <tag> <text>`; the tag is `F` for a full line and `P` for a part of
//! one that is longer than 16 KiB or that the process ended without a newline.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// The longest text of one line of the log; longer ones are split.
const MAX_LINE: usize = 16 * 1024;

/// Where a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// The log file of one container.
///
/// What the disk does not take is kept; as long as something is kept, [`LogFile::is_blocked`] says
/// so, and the shim reads nothing more from the container, which then waits in its `write`.
pub(crate) struct LogFile {
    path: PathBuf,
    file: Option<File>,
    /// Lines without their end yet, for standard output and error.
    partial: [Vec<u8>; 2],
    /// Formatted bytes that are not in the file yet.
    unwritten: Vec<u8>,
}

impl LogFile {
    pub(crate) fn new(path: &str) -> LogFile {
        let mut log = LogFile {
            path: PathBuf::from(path),
            file: None,
            partial: [Vec::new(), Vec::new()],
            unwritten: Vec::new(),
        };
        // A log that can't be opened now is tried again with the first line.
        let _ = log.reopen();
        log
    }

    /// Opens the file anew, as after a rotation.
    pub(crate) fn reopen(&mut self) -> std::io::Result<()> {
        if self.path.as_os_str().is_empty() {
            return Ok(());
        }
        self.file = Some(open(&self.path)?);
        Ok(())
    }

    /// Takes what a process wrote.
    pub(crate) fn append(&mut self, stream: Stream, mut bytes: &[u8], now: i64) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        let partial = &mut self.partial[stream as usize];
        while !bytes.is_empty() {
            let room = MAX_LINE - partial.len();
            let newline = bytes.iter().position(|b| *b == b'\n');
            match newline {
                Some(at) if at <= room => {
                    partial.extend_from_slice(&bytes[..at]);
                    format_line(&mut self.unwritten, now, stream, b'F', partial);
                    partial.clear();
                    bytes = &bytes[at + 1..];
                }
                _ if bytes.len() > room => {
                    partial.extend_from_slice(&bytes[..room]);
                    format_line(&mut self.unwritten, now, stream, b'P', partial);
                    partial.clear();
                    bytes = &bytes[room..];
                }
                _ => {
                    partial.extend_from_slice(bytes);
                    bytes = &[];
                }
            }
        }
        self.flush();
    }

    /// Writes what is left of a line that will not get its newline any more.
    pub(crate) fn end(&mut self, stream: Stream, now: i64) {
        let partial = std::mem::take(&mut self.partial[stream as usize]);
        if !partial.is_empty() {
            format_line(&mut self.unwritten, now, stream, b'P', &partial);
            self.flush();
        }
    }

    /// Tries to get the kept bytes onto the disk.
    pub(crate) fn flush(&mut self) {
        if self.unwritten.is_empty() {
            return;
        }
        if self.file.is_none() && self.reopen().is_err() {
            return;
        }
        let Some(file) = self.file.as_mut() else { return };
        let mut done = 0;
        while done < self.unwritten.len() {
            match file.write(&self.unwritten[done..]) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // A full or failing disk: keep the bytes and try again later.
                Err(_) => break,
            }
        }
        self.unwritten.drain(..done);
        if self.unwritten.is_empty() && self.unwritten.capacity() > 2 * MAX_LINE {
            self.unwritten = Vec::new();
        }
    }

    pub(crate) fn is_blocked(&self) -> bool {
        !self.unwritten.is_empty()
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o640)
        .custom_flags(libc::O_CLOEXEC)
        .open(path)
}

fn format_line(out: &mut Vec<u8>, now: i64, stream: Stream, tag: u8, text: &[u8]) {
    write_time(out, now);
    out.extend_from_slice(match stream {
        Stream::Stdout => b" stdout ",
        Stream::Stderr => b" stderr ",
    });
    out.push(tag);
    out.push(b' ');
    out.extend_from_slice(text);
    out.push(b'\n');
}

/// RFC 3339 with nanoseconds, in UTC.
fn write_time(out: &mut Vec<u8>, nanos: i64) {
    let seconds = nanos.div_euclid(1_000_000_000);
    let fraction = nanos.rem_euclid(1_000_000_000);
    let days = seconds.div_euclid(86_400);
    let of_day = seconds.rem_euclid(86_400);
    let (year, month, day) = civil(days);
    let _ = write!(
        out,
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{fraction:09}Z",
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60
    );
}

/// The date of a day counted from 1970-01-01, in the proleptic Gregorian calendar. Years are taken
/// to begin in March, so that the leap day is the last of its year.
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(log: &LogFile) -> String {
        String::from_utf8(std::fs::read(&log.path).unwrap()).unwrap()
    }

    fn temporary(name: &str) -> String {
        let path = std::env::temp_dir().join(format!("keelson-shim-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path.to_string_lossy().into_owned()
    }

    #[test]
    fn lines_are_tagged_and_split() {
        let path = temporary("lines");
        let mut log = LogFile::new(&path);
        log.append(Stream::Stdout, b"one\ntw", 0);
        log.append(Stream::Stderr, b"err\n", 1);
        log.append(Stream::Stdout, b"o\nrest", 1_700_000_000_123_456_789);
        log.end(Stream::Stdout, 2_000_000_000);
        assert_eq!(
            text(&log),
            "1970-01-01T00:00:00.000000000Z stdout F one\n\
             1970-01-01T00:00:00.000000001Z stderr F err\n\
             2023-11-14T22:13:20.123456789Z stdout F two\n\
             1970-01-01T00:00:02.000000000Z stdout P rest\n"
        );
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_long_line_is_written_in_parts_of_16_kib() {
        let path = temporary("long");
        let mut log = LogFile::new(&path);
        let mut line = vec![b'x'; 2 * MAX_LINE + 10];
        line.push(b'\n');
        log.append(Stream::Stdout, &line, 0);
        let tags: Vec<_> = text(&log)
            .lines()
            .map(|l| {
                let mut words = l.splitn(4, ' ').skip(2);
                (words.next().unwrap().to_owned(), words.next().unwrap().len())
            })
            .collect();
        assert_eq!(
            tags,
            [("P".to_owned(), MAX_LINE), ("P".to_owned(), MAX_LINE), ("F".to_owned(), 10)]
        );
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn leap_days_are_right() {
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(19_782), (2024, 2, 29));
        assert_eq!(civil(19_783), (2024, 3, 1));
        assert_eq!(civil(0), (1970, 1, 1));
    }
}
