//! The last good text of each manifest, kept so that a file which is broken at the moment of a
//! restart takes no pod down.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::labels;

/// A folder with one copy for each manifest, named by the hash of the manifest's path.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// Nowhere if absent.
    folder: Option<PathBuf>,
    /// The hashes of what was written, by name.
    written: BTreeMap<String, [u8; 32]>,
}

fn name_of(file: &Path) -> String {
    labels::hex(&Sha256::digest(file.as_os_str().as_encoded_bytes()))
}

impl Kept {
    /// Copies in this folder.
    pub(crate) fn new(folder: Option<PathBuf>) -> Self {
        Self { folder, written: BTreeMap::new() }
    }

    /// The last good text of a manifest.
    pub(crate) fn read(&self, file: &Path) -> Option<Vec<u8>> {
        fs::read(self.folder.as_ref()?.join(name_of(file))).ok()
    }

    /// Keeps the text of a manifest that is good.
    pub(crate) fn write(&mut self, file: &Path, text: &[u8]) -> io::Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let (name, hash) = (name_of(file), Sha256::digest(text).into());
        let path = folder.join(&name);
        if self.written.get(&name) == Some(&hash) {
            return Ok(());
        }
        if fs::read(&path).ok().as_deref() != Some(text) {
            fs::create_dir_all(folder)?;
            let temporary = path.with_extension("tmp");
            let mut options = fs::OpenOptions::new();
            // manifests may hold passwords in their environment
            let mut copy =
                options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            io::Write::write_all(&mut copy, text)?;
            copy.sync_all()?;
            fs::rename(&temporary, &path)?;
        }
        self.written.insert(name, hash);
        Ok(())
    }

    /// Forgets all but these manifests.
    pub(crate) fn retain<'a>(
        &mut self,
        files: impl Iterator<Item = &'a PathBuf>,
    ) -> io::Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let names: BTreeSet<String> = files.map(|file| name_of(file)).collect();
        self.written.retain(|name, _| names.contains(name));
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            if !entry.file_name().to_str().is_some_and(|name| names.contains(name)) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}
