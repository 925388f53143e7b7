//! What a `hostPath` volume's `type` asks to be there.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt},
    path::Path,
};

use super::plan::HostPathKind;

/// Checks the path, and makes what the type says may be made.
///
/// # Errors
/// The kubelet's own words.
pub(crate) fn prepare(path: &Path, kind: HostPathKind) -> Result<(), String> {
    let failed = |error: io::Error| format!("hostPath {}: {error}", path.display());
    match kind {
        HostPathKind::DirectoryOrCreate if !path.exists() => {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(failed)?;
        }
        HostPathKind::FileOrCreate if !path.exists() => {
            let mut options = fs::OpenOptions::new();
            options.write(true).create(true).truncate(false).mode(0o644);
            options.open(path).map_err(failed)?;
        }
        _ => {}
    }
    let found = fs::metadata(path).map(|metadata| metadata.file_type());
    let is = |what: fn(&fs::FileType) -> bool| found.as_ref().is_ok_and(what);
    let (right, expected) = match kind {
        HostPathKind::Unset => return Ok(()),
        HostPathKind::Directory | HostPathKind::DirectoryOrCreate => {
            (is(fs::FileType::is_dir), "directory")
        }
        HostPathKind::File | HostPathKind::FileOrCreate => (is(fs::FileType::is_file), "file"),
        HostPathKind::Socket => (is(FileTypeExt::is_socket), "socket file"),
        HostPathKind::CharDevice => (is(FileTypeExt::is_char_device), "character device"),
        HostPathKind::BlockDevice => (is(FileTypeExt::is_block_device), "block device"),
    };
    if right {
        return Ok(());
    }
    Err(format!("hostPath type check failed: {} is not a {expected}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn every_documented_type_is_checked() {
        use HostPathKind as Kind;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("dir")).unwrap();
        fs::write(at("file"), "x").unwrap();
        let _socket = UnixListener::bind(at("socket")).unwrap();
        for (name, kind, right) in [
            ("none", Kind::Unset, true),
            ("none", Kind::Directory, false),
            ("dir", Kind::Directory, true),
            ("file", Kind::Directory, false),
            ("new/deep", Kind::DirectoryOrCreate, true),
            ("dir", Kind::DirectoryOrCreate, true),
            ("file", Kind::DirectoryOrCreate, false),
            ("none", Kind::File, false),
            ("file", Kind::File, true),
            ("new-file", Kind::FileOrCreate, true),
            ("dir", Kind::FileOrCreate, false),
            ("no-parent/file", Kind::FileOrCreate, false),
            ("socket", Kind::Socket, true),
            ("file", Kind::Socket, false),
            ("file", Kind::CharDevice, false),
            ("file", Kind::BlockDevice, false),
        ] {
            let outcome = prepare(&at(name), kind);
            assert_eq!(outcome.is_ok(), right, "{name} {kind:?} {outcome:?}");
        }
        assert!(prepare(Path::new("/dev/null"), Kind::CharDevice).is_ok());
        let said = prepare(&at("file"), Kind::Directory).unwrap_err();
        assert!(said.starts_with("hostPath type check failed: /") && said.ends_with("a directory"));
        assert_eq!(fs::read(at("file")).unwrap(), b"x");
    }
}
