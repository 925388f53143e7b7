//! Where settings come from, so that what is wrong in them is told with its place.

use std::path::{Path, PathBuf};

use anyhow::anyhow;
use serde_json::Value;

use super::line_of;

/// Where settings come from. Those made by hand come from nowhere.
#[derive(Clone, Debug, Default)]
pub(crate) struct Origin {
    file: Option<File>,
    /// The fields that the given flags stand for.
    flags: Value,
}

#[derive(Clone, Debug)]
struct File {
    path: PathBuf,
    text: String,
    fields: Value,
}

impl Origin {
    /// Flags, which win over a file.
    pub(super) fn flags(fields: Value) -> Self {
        Self { file: None, flags: fields }
    }

    /// And a file with this text, which holds these fields.
    pub(super) fn file(&mut self, path: &Path, text: String, fields: Value) {
        self.file = Some(File { path: path.to_owned(), text, fields });
    }

    /// A field's value as it was written.
    pub(crate) fn written(&self, field: &str) -> Option<&Value> {
        let pointer = pointer(field);
        let file = self.file.as_ref().map(|file| &file.fields);
        let given = [Some(&self.flags), file].into_iter().flatten();
        given.filter_map(|fields| fields.pointer(&pointer)).find(|value| !value.is_null())
    }

    /// Everything that is wrong, with its file and line where that is where it stands.
    ///
    /// # Errors
    /// When there is anything.
    pub(crate) fn check(&self, wrong: Wrong) -> anyhow::Result<()> {
        let (mut by_flags, mut in_file) = (Vec::new(), Vec::new());
        for (field, message) in wrong.0 {
            let pointer = pointer(&field);
            let is_given = |fields: &Value| fields.pointer(&pointer).is_some_and(|v| !v.is_null());
            match &self.file {
                _ if is_given(&self.flags) => by_flags.push(message),
                Some(file) if is_given(&file.fields) => {
                    let path: Vec<&str> = field.split('.').collect();
                    let line = line_of(&file.text, &path);
                    in_file.push((line, format!("line {line}: {message}")));
                }
                _ => in_file.push((0, message)),
            }
        }
        in_file.sort_by_key(|(line, _)| *line);
        let in_file: Vec<String> = in_file.into_iter().map(|(_, message)| message).collect();
        let file = self.file.as_ref().map(|file| format!("config file {}: ", file.path.display()));
        let told: Vec<String> =
            [(file.unwrap_or_default(), in_file), ("flags: ".to_owned(), by_flags)]
                .into_iter()
                .filter(|(_, messages)| !messages.is_empty())
                .map(|(place, messages)| format!("{place}{}", messages.join("; ")))
                .collect();
        if told.is_empty() { Ok(()) } else { Err(anyhow!(told.join("; "))) }
    }
}

/// A field's path as `serde_json` has it.
fn pointer(field: &str) -> String {
    format!("/{}", field.replace('.', "/"))
}

/// What is wrong in settings.
#[derive(Debug, Default)]
pub(crate) struct Wrong(Vec<(String, String)>);

impl Wrong {
    /// What a field's value comes to, unless it is wrong. The message names the field; the place
    /// told is that of `field`.
    pub(crate) fn unless<T>(&mut self, field: &str, value: Result<T, String>) -> Option<T> {
        value.map_err(|message| self.0.push((field.to_owned(), message))).ok()
    }
}
