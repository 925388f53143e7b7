//! Notices changes in a folder at once.

use std::{
    os::fd::{AsFd, AsRawFd, RawFd},
    path::Path,
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::{Interest, unix::AsyncFd};

/// A watch of one folder.
pub(crate) struct FolderWatch {
    inotify: AsyncFd<Descriptor>,
}

struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl FolderWatch {
    /// Begins to watch. The folder must be there.
    pub(crate) fn new(folder: &Path) -> std::io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        // a file counts when it was written and closed, or moved into place, so that half of one is
        // read as seldom as can be
        let interesting = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        inotify.add_watch(folder, interesting)?;
        // SAFETY: `as_raw_fd` of the descriptor answers with the same open file for as long as the
        // descriptor lives, and the registration owns the descriptor.
        let inotify =
            unsafe { AsyncFd::register_with_interest(Descriptor(inotify), Interest::READABLE) }?;
        Ok(Self { inotify })
    }

    /// Waits for the next change. `false` when the folder itself is gone and the watch with it.
    pub(crate) async fn changed(&mut self) -> std::io::Result<bool> {
        loop {
            let mut ready = self.inotify.readable_mut().await?;
            match ready.get_inner().0.read_events() {
                Ok(events) => {
                    let gone = AddWatchFlags::IN_DELETE_SELF
                        | AddWatchFlags::IN_MOVE_SELF
                        | AddWatchFlags::IN_IGNORED;
                    return Ok(!events.iter().any(|event| event.mask.intersects(gone)));
                }
                Err(nix::errno::Errno::EAGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}
