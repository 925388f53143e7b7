//! Writes files below one folder, and nowhere else.
//!
//! A path from an archive is taken apart into names; parents are opened with `openat2` so that the
//! kernel itself resolves symbolic links as if the folder were `/`; the last name is only ever used
//! with calls that do not follow links. So whatever links an archive plants, it hits its own tree.

use std::{
    ffi::{CStr, CString, OsStr, OsString},
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2},
    sys::{
        stat::{self, FileStat, Mode, SFlag, UtimensatFlags},
        time::TimeSpec,
    },
    unistd::{self, Gid, Uid, UnlinkatFlags},
};

/// The deepest folder that is written. Paths of the kernel's own limit have at most 2,048 parts.
const MAX_DEPTH: usize = 512;
/// A piece of a file that is all zeros and this long becomes a hole.
const HOLE: usize = 4096;

/// Owner, mode and time of an entry.
pub(super) struct Attributes {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Permission bits with set-id and sticky bits.
    pub(super) mode: u32,
    pub(super) mtime: TimeSpec,
    /// Extended attributes by name.
    pub(super) xattrs: Vec<(CString, Vec<u8>)>,
}

/// A checked path: names only, none of them `.` or `..`. Empty for the root itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Names(Vec<OsString>);

impl Names {
    /// Takes a path from an archive apart. A leading slash means nothing; `..` is refused.
    pub(super) fn parse(path: &Path) -> io::Result<Self> {
        let mut names = Vec::new();
        for component in path.components() {
            match component {
                Component::Normal(name) => names.push(name.to_owned()),
                Component::RootDir | Component::CurDir => {}
                Component::ParentDir | Component::Prefix(_) => {
                    return Err(invalid(format!("path {path:?} leaves the layer")));
                }
            }
        }
        if names.len() > MAX_DEPTH {
            return Err(invalid(format!("a path has more than {MAX_DEPTH} parts")));
        }
        Ok(Self(names))
    }

    /// The last name and the names before it; nothing for the root.
    pub(super) fn split(&self) -> Option<(&[OsString], &OsStr)> {
        self.0.split_last().map(|(last, parents)| (parents, last.as_os_str()))
    }
}

/// A folder that is being filled from an archive.
pub(super) struct Tree {
    root: OwnedFd,
    /// The parent that was opened last, since archives list a folder's entries together.
    last_parent: Option<(Vec<OsString>, OwnedFd)>,
    /// Folders' times, set at the end: writing into a folder changes them.
    folder_times: Vec<(PathBuf, TimeSpec)>,
}

impl Tree {
    /// Opens the folder to fill, which exists and is empty.
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        let root = nix::fcntl::open(root, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        Ok(Self { root, last_parent: None, folder_times: Vec::new() })
    }

    /// Makes a folder, or gives a folder that is there new attributes.
    pub(super) fn folder(&mut self, path: &Names, attributes: &Attributes) -> io::Result<()> {
        let folder = match path.split() {
            None => self.root.try_clone()?,
            Some((parents, name)) => {
                let parent = self.parent(parents)?;
                let mut hides_lower = false;
                match lstat(&parent, name)? {
                    Some(found) if is_kind(&found, SFlag::S_IFDIR) => {}
                    found => {
                        hides_lower = found.as_ref().is_some_and(is_whiteout);
                        if found.is_some() {
                            self.remove(&parent, name)?;
                        }
                        stat::mkdirat(&parent, name, Mode::S_IRWXU)?;
                    }
                }
                let folder = open_folder(&parent, name)?;
                if hides_lower {
                    set_opaque(folder.as_fd())?;
                }
                folder
            }
        };
        apply(folder.as_fd(), attributes)?;
        self.folder_times.push((path.0.iter().collect(), attributes.mtime));
        Ok(())
    }

    /// Writes a file. Returns how many bytes it takes, holes not counted.
    pub(super) fn file(
        &mut self,
        path: &Names,
        attributes: &Attributes,
        content: &mut impl Read,
    ) -> io::Result<u64> {
        let (parent, name) = self.place(path)?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
        let file = openat(&parent, name.as_os_str(), flags | OFlag::O_CLOEXEC, Mode::S_IRWXU)?;
        let mut file = File::from(file);
        let written = copy_with_holes(content, &mut file)?;
        apply(file.as_fd(), attributes)?;
        stat::futimens(&file, &attributes.mtime, &attributes.mtime)?;
        Ok(written)
    }

    /// Makes a symbolic link. Where it points to is the container's business.
    pub(super) fn symlink(
        &mut self,
        path: &Names,
        target: &Path,
        attributes: &Attributes,
    ) -> io::Result<()> {
        let (parent, name) = self.place(path)?;
        // A folder that was reached through this name before may be reached by another way now.
        self.last_parent = None;
        unistd::symlinkat(target, &parent, name.as_os_str())?;
        own(&parent, &name, attributes)
    }

    /// Gives a file of this layer a second name.
    pub(super) fn hard_link(&mut self, path: &Names, target: &Names) -> io::Result<()> {
        let missing = || invalid(format!("hard link to {:?}, which is not in it", target.0));
        let (from_parents, from_name) = target.split().ok_or_else(missing)?;
        let from_name = from_name.to_owned();
        let from = match open_beneath(self.root.as_fd(), from_parents) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Err(missing()),
            from => from?,
        };
        match lstat(&from, &from_name)? {
            Some(found) if !is_kind(&found, SFlag::S_IFDIR) && !is_whiteout(&found) => {}
            _ => return Err(missing()),
        }
        if path == target {
            return Ok(());
        }
        let (parent, name) = self.place(path)?;
        unistd::linkat(&from, from_name.as_os_str(), &parent, name.as_os_str(), AtFlags::empty())
            .map_err(|errno| if errno == Errno::ENOENT { missing() } else { errno.into() })
    }

    /// Makes a device or a named pipe.
    pub(super) fn node(
        &mut self,
        path: &Names,
        kind: SFlag,
        device: (u32, u32),
        attributes: &Attributes,
    ) -> io::Result<()> {
        let (parent, name) = self.place(path)?;
        let device = stat::makedev(device.0.into(), device.1.into());
        stat::mknodat(&parent, name.as_os_str(), kind, Mode::S_IRUSR | Mode::S_IWUSR, device)?;
        own(&parent, &name, attributes)?;
        // O_PATH can't be used with fchmod, so this goes by name; the node was just made.
        let mode = Mode::from_bits_truncate(attributes.mode);
        stat::fchmodat(&parent, name.as_os_str(), mode, stat::FchmodatFlags::NoFollowSymlink)
            .or_else(|errno| match errno {
                // Before fchmodat2 (Linux 6.6) there is no way to say "no follow"; a node is no link.
                Errno::EOPNOTSUPP => stat::fchmodat(
                    &parent,
                    name.as_os_str(),
                    mode,
                    stat::FchmodatFlags::FollowSymlink,
                ),
                errno => Err(errno),
            })?;
        Ok(())
    }

    /// Marks a name as removed from the layers below, as overlay does: a 0/0 character device.
    pub(super) fn whiteout(&mut self, path: &Names) -> io::Result<()> {
        let Some((parents, name)) = path.split() else {
            return Err(invalid("a whiteout of the root".into()));
        };
        let parent = self.parent(parents)?;
        match lstat(&parent, name)? {
            None => {
                stat::mknodat(&parent, name, SFlag::S_IFCHR, Mode::empty(), 0)?;
                Ok(())
            }
            // This layer itself has put something in its place: a whiteout is about those below.
            Some(found) if is_kind(&found, SFlag::S_IFDIR) => {
                set_opaque(open_folder(&parent, name)?.as_fd())
            }
            Some(_) => Ok(()),
        }
    }

    /// Hides what the layers below have in this folder.
    pub(super) fn opaque(&mut self, folder: &Names) -> io::Result<()> {
        let folder = self.parent(&folder.0)?;
        set_opaque(folder.as_fd())
    }

    /// Sets the folders' times and waits until all of it is on the disk.
    pub(super) fn finish(self) -> io::Result<()> {
        for (path, mtime) in self.folder_times.iter().rev() {
            let how = resolve_how(OFlag::O_DIRECTORY | OFlag::O_RDONLY);
            let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
            match openat2(&self.root, path, how) {
                Ok(folder) => stat::futimens(&folder, mtime, mtime)?,
                // It was replaced by something else later in the archive.
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        unistd::syncfs(&self.root)?;
        Ok(())
    }

    /// The folder for a new entry and the entry's name, with whatever had that name gone.
    fn place(&mut self, path: &Names) -> io::Result<(OwnedFd, OsString)> {
        let Some((parents, name)) = path.split() else {
            return Err(invalid("the root is not a folder".into()));
        };
        let parent = self.parent(parents)?;
        if lstat(&parent, name)?.is_some() {
            self.remove(&parent, name)?;
        }
        Ok((parent, name.to_owned()))
    }

    /// Opens a folder, making what is missing of it as the container's root would have it.
    fn parent(&mut self, names: &[OsString]) -> io::Result<OwnedFd> {
        if let Some((last, folder)) = &self.last_parent
            && last == names
        {
            return folder.try_clone();
        }
        let folder = match open_beneath(self.root.as_fd(), names) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => self.make(names)?,
            folder => folder?,
        };
        self.last_parent = Some((names.to_owned(), folder.try_clone()?));
        Ok(folder)
    }

    fn make(&self, names: &[OsString]) -> io::Result<OwnedFd> {
        let mut folder = self.root.try_clone()?;
        for (at, name) in names.iter().enumerate() {
            // From the root each time, so that a link on the way is resolved against the root.
            folder = match open_beneath(self.root.as_fd(), &names[..=at]) {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    stat::mkdirat(&folder, name.as_os_str(), Mode::from_bits_truncate(0o755))?;
                    let made = open_folder(&folder, name)?;
                    // Whatever the process's umask.
                    stat::fchmod(&made, Mode::from_bits_truncate(0o755))?;
                    made
                }
                folder => folder?,
            };
        }
        Ok(folder)
    }

    fn remove(&mut self, parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
        self.last_parent = None;
        remove_all(parent.as_fd(), name, 0)
    }
}

fn resolve_how(flags: OFlag) -> OpenHow {
    OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS)
}

/// Opens a folder as a process whose root is `root` would find it.
fn open_beneath(root: BorrowedFd<'_>, names: &[OsString]) -> io::Result<OwnedFd> {
    if names.is_empty() {
        return root.try_clone_to_owned();
    }
    let path: PathBuf = names.iter().collect();
    // EAGAIN: something was renamed meanwhile, and the kernel could not be sure.
    for _ in 0..16 {
        match openat2(root, &path, resolve_how(OFlag::O_DIRECTORY | OFlag::O_RDONLY)) {
            Err(Errno::EAGAIN) => {}
            folder => return Ok(folder?),
        }
    }
    Err(Errno::EAGAIN.into())
}

fn open_folder(parent: &OwnedFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(parent, name, flags, Mode::empty())?)
}

fn lstat(parent: &OwnedFd, name: &OsStr) -> io::Result<Option<FileStat>> {
    match stat::fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn is_kind(found: &FileStat, kind: SFlag) -> bool {
    SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits()) == kind
}

fn is_whiteout(found: &FileStat) -> bool {
    is_kind(found, SFlag::S_IFCHR) && found.st_rdev == 0
}

fn remove_all(parent: BorrowedFd<'_>, name: &OsStr, depth: usize) -> io::Result<()> {
    match unistd::unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::EISDIR | Errno::EPERM) if depth <= MAX_DEPTH => {}
        Err(errno) => return Err(errno.into()),
    }
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut folder = Dir::openat(parent, name, flags, Mode::empty())?;
    let entries = folder
        .iter()
        .map(|entry| entry.map(|entry| entry.file_name().to_owned()))
        .collect::<Result<Vec<_>, _>>()?;
    for entry in entries.iter().filter(|e| !matches!(e.to_bytes(), b"." | b"..")) {
        remove_all(folder.as_fd(), OsStr::from_bytes(entry.to_bytes()), depth + 1)?;
    }
    unistd::unlinkat(parent, name, UnlinkatFlags::RemoveDir)?;
    Ok(())
}

/// Owner, extended attributes and mode, in the order in which none undoes another: a change of
/// owner clears set-id bits and capabilities.
fn apply(file: BorrowedFd<'_>, attributes: &Attributes) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
    unistd::fchown(file, Some(uid), Some(gid))?;
    for (name, value) in &attributes.xattrs {
        set_xattr(file, name, value)?;
    }
    stat::fchmod(file, Mode::from_bits_truncate(attributes.mode))?;
    Ok(())
}

fn own(parent: &OwnedFd, name: &OsStr, attributes: &Attributes) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
    unistd::fchownat(parent, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let flag = UtimensatFlags::NoFollowSymlink;
    stat::utimensat(parent, name, &attributes.mtime, &attributes.mtime, flag)?;
    Ok(())
}

fn set_opaque(folder: BorrowedFd<'_>) -> io::Result<()> {
    set_xattr(folder, c"trusted.overlay.opaque", b"y")
}

fn set_xattr(file: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> io::Result<()> {
    // SAFETY: `name` is a C string and `value` a buffer of the given length, both alive for the
    // call; the descriptor is borrowed.
    let result = unsafe {
        libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0)
    };
    Ok(Errno::result(result).map(drop)?)
}

fn copy_with_holes(content: &mut impl Read, file: &mut File) -> io::Result<u64> {
    let mut buffer = vec![0; 64 * HOLE];
    let (mut written, mut length) = (0, 0);
    loop {
        let filled = fill(content, &mut buffer)?;
        if filled == 0 {
            break;
        }
        for piece in buffer[..filled].chunks(HOLE) {
            if piece.len() == HOLE && piece.iter().all(|b| *b == 0) {
                file.seek(SeekFrom::Current(HOLE as i64))?;
            } else {
                file.write_all(piece)?;
                written += piece.len() as u64;
            }
        }
        length += filled as u64;
    }
    // A hole at the end is only there if the length says so.
    file.set_len(length)?;
    Ok(written)
}

fn fill(content: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match content.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}
