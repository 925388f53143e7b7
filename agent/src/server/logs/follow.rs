//! Reading a log file: from the start or from so many lines before the end, and on while it grows
//! and is rotated.

use std::{
    io::{self, Read, Seek, SeekFrom},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::Path,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use keelson_runtime_shim::{
    PodRuntime,
    runtime::{ContainerId, ContainerState},
};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::{
    fs::File,
    io::{AsyncBufReadExt, AsyncReadExt, BufReader, unix::AsyncFd},
    sync::mpsc,
};

use super::{LogFile, LogOptions, line::Show};

/// The longest entry that is read; the writer cuts lines at 16 KiB.
const MAX_ENTRY: u64 = 1 << 20;
/// How often the container is looked at while its log is silent.
const LOOK: Duration = Duration::from_secs(1);
/// Bytes gathered before they are sent on.
const PIECE: usize = 32 << 10;

/// Sends what is wanted of a log to `out` until its end; with `follow`, until the container ended
/// too, or the client is gone.
///
/// # Errors
/// When the file can't be read.
pub(in crate::server) async fn follow(
    file: LogFile,
    options: LogOptions,
    container: (Arc<dyn PodRuntime>, ContainerId),
    out: mpsc::Sender<Bytes>,
) -> io::Result<()> {
    let mut changes = if options.follow { Some(Changes::of(&file.path)?) } else { None };
    let mut reader = open(&file.path, options.tail_lines).await?;
    let mut show = Show::new(&options);
    let (mut entry, mut piece) = (Vec::new(), Vec::new());
    let (mut ended, mut rotated) = (false, false);
    while !show.is_done() {
        let room = MAX_ENTRY.saturating_sub(entry.len() as u64);
        if room == 0 {
            return Err(io::Error::other("a log entry of more than 1 MiB"));
        }
        let read = (&mut reader).take(room).read_until(b'\n', &mut entry).await?;
        if entry.last() == Some(&b'\n') {
            entry.pop();
            piece.extend(show.shown(&entry));
            entry.clear();
            if piece.len() < PIECE {
                continue;
            }
        }
        if !piece.is_empty() && out.send(Bytes::from(std::mem::take(&mut piece))).await.is_err() {
            return Ok(());
        }
        if read > 0 {
            continue;
        }
        // The end for now.
        let Some(changes) = &mut changes else { return Ok(()) };
        if rotated {
            rotated = false;
            reader = open(&file.path, None).await?;
            continue;
        }
        if is_rotated(&reader, &file.path).await {
            // Between the end that was met and the new file more may have been written to the old
            // one; once there is a new one, no more.
            rotated = true;
            continue;
        }
        if ended {
            return Ok(());
        }
        // What was written before the container ended is read once more.
        ended = !is_running(&container).await;
        if !ended {
            tokio::select! {
                changed = changes.wait() => changed?,
                () = tokio::time::sleep(LOOK) => {}
                () = out.closed() => return Ok(()),
            }
        }
    }
    if !piece.is_empty() {
        let _ = out.send(Bytes::from(piece)).await;
    }
    Ok(())
}

async fn is_running((runtime, id): &(Arc<dyn PodRuntime>, ContainerId)) -> bool {
    runtime.container_status(id).await.is_ok_and(|status| {
        matches!(status.state, ContainerState::Created | ContainerState::Running)
    })
}

async fn open(path: &Path, tail_lines: Option<u64>) -> io::Result<BufReader<File>> {
    let path = path.to_owned();
    let file = tokio::task::spawn_blocking(move || {
        let mut file = std::fs::File::open(path)?;
        if let Some(lines) = tail_lines {
            let start = tail_start(&mut file, lines)?;
            file.seek(SeekFrom::Start(start))?;
        }
        Ok::<_, io::Error>(file)
    })
    .await
    .map_err(io::Error::other)??;
    Ok(BufReader::with_capacity(PIECE, File::from_std(file)))
}

/// Where the last `lines` lines begin.
fn tail_start(file: &mut (impl Read + Seek), lines: u64) -> io::Result<u64> {
    const BLOCK: u64 = 64 << 10;
    let end = file.seek(SeekFrom::End(0))?;
    if lines == 0 {
        return Ok(end);
    }
    let (mut position, mut found) = (end, 0);
    let mut block = Vec::new();
    while position > 0 {
        let start = position.saturating_sub(BLOCK);
        file.seek(SeekFrom::Start(start))?;
        block.clear();
        file.by_ref().take(position - start).read_to_end(&mut block)?;
        for (index, byte) in block.iter().enumerate().rev() {
            let at = start + index as u64;
            // The break at the very end belongs to the last line.
            if *byte == b'\n' && at + 1 != end {
                found += 1;
                if found == lines {
                    return Ok(at + 1);
                }
            }
        }
        position = start;
    }
    Ok(0)
}

/// Whether the path leads to another file than the one that is open.
async fn is_rotated(reader: &BufReader<File>, path: &Path) -> bool {
    let (open, there) = tokio::join!(reader.get_ref().metadata(), tokio::fs::metadata(path));
    match (open, there) {
        (Ok(open), Ok(there)) => (open.dev(), open.ino()) != (there.dev(), there.ino()),
        _ => false,
    }
}

/// Tells when something happens in a log's folder.
struct Changes {
    inotify: AsyncFd<OwnedFd>,
}

impl Changes {
    fn of(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        inotify.add_watch(
            folder,
            AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO,
        )?;
        // SAFETY: the descriptor is owned by the AsyncFd, and lives and stays the same as long as it.
        let inotify = unsafe { AsyncFd::register(OwnedFd::from(inotify))? };
        Ok(Self { inotify })
    }

    async fn wait(&mut self) -> io::Result<()> {
        // What happened is of no interest, only that something did.
        let mut events = [0; 4096];
        let mut ready = self.inotify.readable().await?;
        match ready
            .try_io(|inotify| nix::unistd::read(inotify, &mut events).map_err(io::Error::from))
        {
            Ok(read) => read.map(drop),
            Err(_would_block) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn the_last_lines_are_found() {
        let text = "one\ntwo\nthree\n";
        for (lines, rest) in [(0, ""), (1, "three\n"), (2, "two\nthree\n"), (3, text), (9, text)] {
            let start = tail_start(&mut Cursor::new(text), lines).unwrap();
            assert_eq!(&text[start as usize..], rest, "{lines}");
        }
        let open = "one\ntwo";
        assert_eq!(tail_start(&mut Cursor::new(open), 1).unwrap(), 4);
        let long = "x".repeat(200_000) + "\nlast\n";
        assert_eq!(tail_start(&mut Cursor::new(&long), 1).unwrap(), 200_001);
    }
}
