//! A container's termination message: what it left in its file, or the end of its log.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

use keelson_runtime_shim::runtime::ContainerStatus;

use super::view;
use crate::labels;

/// The longest message; what is over is cut, as documented.
const FILE_BYTES: u64 = 4096;
/// The most that is taken from the log.
const LOG_BYTES: u64 = 2048;
/// The most lines that are taken from the log.
const LOG_LINES: usize = 80;

/// Reads the message of an ended container. Blocks on the file system.
pub(crate) fn read(status: &ContainerStatus) -> String {
    let annotation = |key: &str| status.annotations.get(key).map(String::as_str);
    let from_file = annotation(labels::TERMINATION_MESSAGE_FILE)
        .and_then(|file| first_bytes(Path::new(file)))
        .unwrap_or_default();
    let from_log = annotation(labels::TERMINATION_MESSAGE_POLICY) == Some("FallbackToLogsOnError")
        && from_file.is_empty()
        && view::exit_code(status) != 0;
    if from_log { end_of_log(&status.log_path).unwrap_or_default() } else { from_file }
}

fn first_bytes(path: &Path) -> Option<String> {
    let mut text = Vec::new();
    // the container may have put anything there: only a plain file is read, and only its beginning
    let file = File::open(path).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    file.take(FILE_BYTES).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// The last lines of a log in the CRI format, without its prefixes.
fn end_of_log(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    // prefixes take room too: read more than is kept
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES * 4))).ok()?;
    let mut text = Vec::new();
    file.take(LOG_BYTES * 4).read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(LOG_LINES);
    let mut message = String::new();
    for line in &lines[from..] {
        // `<time> <stream> <F|P> <text>`
        if let Some(content) = line.splitn(4, ' ').nth(3) {
            message.push_str(content);
            message.push('\n');
        }
    }
    let mut start = message.len().saturating_sub(usize::try_from(LOG_BYTES).unwrap_or(2048));
    while !message.is_char_boundary(start) {
        start += 1;
    }
    Some(message.split_off(start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::fixture;

    #[test]
    fn the_file_comes_before_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let mut status = fixture::exited("a", 0, 1);
        let file = folder.path().join("message");
        status.log_path = folder.path().join("0.log");
        std::fs::write(
            &status.log_path,
            "2026-01-01T00:00:00.0Z stdout F one\n2026-01-01T00:00:00.0Z stderr F two words\n",
        )
        .unwrap();
        status
            .annotations
            .insert(labels::TERMINATION_MESSAGE_FILE.to_owned(), file.display().to_string());
        std::fs::write(&file, "").unwrap();
        assert_eq!(read(&status), "");
        status.annotations.insert(
            labels::TERMINATION_MESSAGE_POLICY.to_owned(),
            "FallbackToLogsOnError".to_owned(),
        );
        assert_eq!(read(&status), "one\ntwo words\n");
        std::fs::write(&file, "x".repeat(5000)).unwrap();
        assert_eq!(read(&status).len(), 4096);
    }
}
