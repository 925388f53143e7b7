//! Puts a volume's files in place so that readers see all of a change or nothing of it.
//!
//! ```text
//!   volume/key      -> ..data/key
//!   volume/..data   -> ..2026_01_02_03_04_05.1234567890
//!   volume/..2026_01_02_03_04_05.1234567890/key
//! ```
//!
//! A change is a new folder beside the old one and one rename of `..data`; this is the layout that
//! Kubernetes documents and programs watch for.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{
        DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink,
    },
    path::{Component, Path},
};

use jiff::Timestamp;

use super::plan::{FileContent, Files};

const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";

/// Makes `volume` hold exactly `files`. Says whether anything had to change.
///
/// Files and folders get the group `group`, if there is one, which may then read them.
pub(crate) fn write(volume: &Path, files: &Files, group: Option<u32>) -> io::Result<bool> {
    let current = fs::read_link(volume.join(DATA)).ok();
    let complete = links_are_there(volume, files);
    if let Some(current) = &current
        && complete
        && holds(&volume.join(current), files, group)?
    {
        return Ok(false);
    }
    let name = fresh_name();
    let folder = volume.join(&name);
    fs::DirBuilder::new().mode(0o755).create(&folder)?;
    if let Err(error) = fill(&folder, files, group) {
        // The old content stays; what is half-made must not.
        let _ = fs::remove_dir_all(&folder);
        return Err(error);
    }
    let new_link = volume.join(DATA_NEW);
    match fs::remove_file(&new_link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(&name, &new_link)?;
    fs::rename(&new_link, volume.join(DATA))?;
    publish(volume, files, group)?;
    remove_old(volume, &name)?;
    Ok(true)
}

/// Whether the volume was ever written.
pub(crate) fn is_written(volume: &Path) -> bool {
    volume.join(DATA).join(".").is_dir()
}

fn fresh_name() -> String {
    let now = Timestamp::now().strftime("%Y_%m_%d_%H_%M_%S");
    format!("..{now}.{}", rand::random::<u32>())
}

fn top(path: &Path) -> Option<OsString> {
    match path.components().next()? {
        Component::Normal(name) => Some(name.to_owned()),
        _ => None,
    }
}

fn tops(files: &Files) -> BTreeSet<OsString> {
    files.keys().filter_map(|path| top(path)).collect()
}

fn links_are_there(volume: &Path, files: &Files) -> bool {
    tops(files).iter().all(|name| {
        fs::read_link(volume.join(name)).is_ok_and(|target| target == Path::new(DATA).join(name))
    })
}

/// Whether the folder already holds exactly these files.
fn holds(folder: &Path, files: &Files, group: Option<u32>) -> io::Result<bool> {
    let mut found = 0;
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        let entries = match fs::read_dir(&next) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
                continue;
            }
            let path = entry.path();
            let Some(wanted) = path.strip_prefix(folder).ok().and_then(|path| files.get(path))
            else {
                return Ok(false);
            };
            let metadata = entry.metadata()?;
            let right = metadata.mode() & 0o7777 == mode_of(wanted, group)
                && metadata.uid() == wanted.owner.unwrap_or(0)
                && group.is_none_or(|group| metadata.gid() == group)
                && metadata.len() == wanted.bytes.len() as u64
                && fs::read(&path)? == wanted.bytes;
            if !right {
                return Ok(false);
            }
            found += 1;
        }
    }
    Ok(found == files.len())
}

/// The group may read what the owner's bits say; nobody may write, since the volume is read-only.
fn mode_of(file: &FileContent, group: Option<u32>) -> u32 {
    match group {
        Some(_) => file.mode | 0o440,
        None => file.mode,
    }
}

fn fill(folder: &Path, files: &Files, group: Option<u32>) -> io::Result<()> {
    for (path, file) in files {
        let path = folder.join(path);
        if let Some(parent) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
        }
        let mut options = OpenOptions::new();
        let mut out = options.write(true).create_new(true).mode(0o600).open(&path)?;
        out.write_all(&file.bytes)?;
        std::os::unix::fs::fchown(&out, file.owner, group)?;
        // After the owner, and whatever the umask.
        out.set_permissions(Permissions::from_mode(mode_of(file, group)))?;
    }
    give_folders(folder, group)
}

/// Folders are passable for all, and the group's own with set-group-id, as documented for `fsGroup`.
fn give_folders(folder: &Path, group: Option<u32>) -> io::Result<()> {
    chown(folder, None, group)?;
    let mode = if group.is_some() { 0o2755 } else { 0o755 };
    fs::set_permissions(folder, Permissions::from_mode(mode))?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            give_folders(&entry.path(), group)?;
        }
    }
    Ok(())
}

/// Makes the names that readers use, and removes those of files that are gone.
fn publish(volume: &Path, files: &Files, group: Option<u32>) -> io::Result<()> {
    let names = tops(files);
    for name in &names {
        let (link, target) = (volume.join(name), Path::new(DATA).join(name));
        if fs::read_link(&link).is_ok_and(|found| found == target) {
            continue;
        }
        match fs::symlink_metadata(&link) {
            Ok(found) if found.is_dir() => fs::remove_dir_all(&link)?,
            Ok(_) => fs::remove_file(&link)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        symlink(&target, &link)?;
        lchown(&link, None, group)?;
    }
    for entry in fs::read_dir(volume)? {
        let name = entry?.file_name();
        if !name.to_string_lossy().starts_with("..") && !names.contains(&name) {
            fs::remove_file(volume.join(name))?;
        }
    }
    Ok(())
}

fn remove_old(volume: &Path, current: &str) -> io::Result<()> {
    for entry in fs::read_dir(volume)? {
        let entry = entry?;
        let name = entry.file_name();
        let of_writer = name.to_string_lossy().starts_with("..2");
        if of_writer && name != current && entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(list: &[(&str, &str, u32)]) -> Files {
        list.iter()
            .map(|(path, text, mode)| {
                let bytes = text.as_bytes().to_vec();
                ((*path).into(), FileContent { bytes, mode: *mode, owner: None })
            })
            .collect()
    }

    fn read(volume: &Path, path: &str) -> Option<String> {
        fs::read_to_string(volume.join(path)).ok()
    }

    #[test]
    fn a_change_is_seen_whole_and_leaves_nothing_old() {
        let folder = tempfile::tempdir().unwrap();
        let volume = folder.path();
        let first = files(&[("a", "1", 0o644), ("dir/b", "2", 0o400), ("gone", "x", 0o644)]);
        assert!(write(volume, &first, None).unwrap());
        assert!(!write(volume, &first, None).unwrap(), "the same again changes nothing");
        assert_eq!(fs::read_link(volume.join("a")).unwrap(), Path::new("..data/a"));
        assert_eq!(fs::read_link(volume.join("dir")).unwrap(), Path::new("..data/dir"));
        assert_eq!(fs::metadata(volume.join("dir/b")).unwrap().mode() & 0o777, 0o400);
        let before = fs::read_link(volume.join("..data")).unwrap();

        let second = files(&[("a", "changed", 0o600), ("new", "n", 0o644)]);
        assert!(write(volume, &second, None).unwrap());
        assert_eq!(read(volume, "a").as_deref(), Some("changed"));
        assert_eq!(read(volume, "new").as_deref(), Some("n"));
        assert!(fs::symlink_metadata(volume.join("gone")).is_err());
        assert!(fs::symlink_metadata(volume.join("dir")).is_err());
        assert!(!volume.join(before).exists());
        assert_eq!(fs::read_dir(volume).unwrap().count(), 4);

        // What somebody broke is mended.
        fs::remove_file(volume.join("a")).unwrap();
        assert!(write(volume, &second, None).unwrap());
        assert_eq!(read(volume, "a").as_deref(), Some("changed"));
        assert!(write(volume, &Files::new(), None).unwrap());
        assert!(is_written(volume) && fs::read_dir(volume).unwrap().count() == 2);
    }

    #[test]
    fn the_group_may_read() {
        let folder = tempfile::tempdir().unwrap();
        let volume = folder.path();
        let wanted = files(&[("d/secret", "s", 0o400)]);
        write(volume, &wanted, Some(4242)).unwrap();
        let file = fs::metadata(volume.join("d/secret")).unwrap();
        assert_eq!((file.gid(), file.mode() & 0o7777), (4242, 0o440));
        let dir = fs::metadata(volume.join("d")).unwrap();
        assert_eq!((dir.gid(), dir.mode() & 0o7777), (4242, 0o2755));
        assert!(!write(volume, &wanted, Some(4242)).unwrap());
        assert!(write(volume, &wanted, Some(4243)).unwrap());
    }
}
