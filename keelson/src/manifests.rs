//! Services, EndpointSlices, Nodes and Pods from manifests, for commands that ask no API.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use k8s_openapi::{
    api::core::v1::{Node, Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use keelson_api::{object::ObjectKey, yaml};
use keelson_proxy::{Objects, Refusal};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::bounded;

/// Large clusters fit in.
const LIMITS: yaml::Limits =
    yaml::Limits { bytes: 256 << 20, depth: 64, nodes: 50_000_000, documents: 1_000_000 };
/// How deep folders are looked into.
const FOLDERS: usize = 8;

/// What was read.
#[derive(Debug, Default)]
pub(crate) struct Manifests {
    pub(crate) objects: Objects,
    pub(crate) nodes: Vec<Node>,
    pub(crate) pods: Vec<Pod>,
    /// What could not be read, each with its place.
    pub(crate) problems: Vec<String>,
    /// Where objects stand, by kind and name.
    places: HashMap<(String, ObjectKey), String>,
}

impl Manifests {
    /// Reads files and folders; what is wrong in one of them leaves the others.
    ///
    /// # Errors
    /// When a path isn't there.
    pub(crate) fn read(paths: &[PathBuf]) -> anyhow::Result<Self> {
        let mut manifests = Self::default();
        for path in paths {
            let mut files = Vec::new();
            find(path, FOLDERS, &mut files)?;
            for file in files {
                manifests.read_file(&file)?;
            }
        }
        Ok(manifests)
    }

    /// The place of an object that the proxy refuses, for a message.
    pub(crate) fn place(&self, refusal: &Refusal) -> String {
        let key = (refusal.kind.to_owned(), refusal.object.clone());
        let place = self.places.get(&key).map_or("", String::as_str);
        format!("{place}: {} {}: {}", refusal.kind, refusal.object, refusal.message)
    }

    fn read_file(&mut self, path: &Path) -> anyhow::Result<()> {
        let text = bounded::read(path, LIMITS.bytes);
        let text = text.with_context(|| format!("read {}", path.display()))?;
        match yaml::documents(&text, LIMITS) {
            Ok(documents) => {
                for (n, document) in documents.into_iter().enumerate() {
                    self.take(&format!("{}: document {}", path.display(), n + 1), document);
                }
            }
            Err(error) => self.problems.push(format!("{}: {error}", path.display())),
        }
        Ok(())
    }

    fn take(&mut self, place: &str, mut document: Value) {
        let kind = document["kind"].as_str().unwrap_or_default().to_owned();
        if kind.ends_with("List") && document["items"].is_array() {
            let item = kind.trim_end_matches("List").to_owned();
            let Value::Array(items) = document["items"].take() else { return };
            for (n, mut one) in items.into_iter().enumerate() {
                if one["kind"].is_null() && !item.is_empty() {
                    one["kind"] = item.clone().into();
                }
                self.take(&format!("{place}, item {}", n + 1), one);
            }
            return;
        }
        let taken = match kind.as_str() {
            "Service" => self.keep(place, &kind, document, |m| &mut m.objects.services),
            "EndpointSlice" => self.keep(place, &kind, document, |m| &mut m.objects.slices),
            "Node" => self.keep(place, &kind, document, |m| &mut m.nodes),
            "Pod" => self.keep(place, &kind, document, |m| &mut m.pods),
            "" => Err("it has no kind".to_owned()),
            // Manifests of a whole application hold much that is not the proxy's.
            _ => Ok(()),
        };
        if let Err(error) = taken {
            self.problems.push(format!("{place}: {error}"));
        }
    }

    fn keep<K>(
        &mut self,
        place: &str,
        kind: &str,
        document: Value,
        list: impl FnOnce(&mut Self) -> &mut Vec<K>,
    ) -> Result<(), String>
    where
        K: DeserializeOwned + k8s_openapi::Metadata<Ty = ObjectMeta>,
    {
        let mut object: K =
            serde_json::from_value(document).map_err(|error| format!("{kind}: {error}"))?;
        let metadata = object.metadata_mut();
        if metadata.name.as_deref().unwrap_or_default().is_empty() {
            return Err(format!("{kind}: it has no name"));
        }
        if kind != "Node" && metadata.namespace.is_none() {
            metadata.namespace = Some("default".to_owned());
        }
        let key = (kind.to_owned(), ObjectKey::of(metadata));
        if let Some(first) = self.places.insert(key, place.to_owned()) {
            return Err(format!("{kind}: it stands in {first} already"));
        }
        list(self).push(object);
        Ok(())
    }

    /// Takes the node of this name out, or the only one if no name is given.
    ///
    /// # Errors
    /// When the name is missing and there are several.
    pub(crate) fn choose_node(&mut self, name: Option<&str>) -> anyhow::Result<()> {
        let named = |node: &Node| name.is_none() || node.metadata.name.as_deref() == name;
        let mut found: Vec<Node> = self.nodes.iter().filter(|node| named(node)).cloned().collect();
        if found.len() > 1 {
            bail!("there are {} nodes: choose one by its name", found.len());
        }
        self.objects.node = found.pop();
        Ok(())
    }
}

fn find(path: &Path, depth: usize, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let context = || format!("read {}", path.display());
    if !fs::metadata(path).with_context(context)?.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    let mut inside: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(path).with_context(context)? {
        inside.push(entry.with_context(context)?.path());
    }
    inside.sort_unstable();
    for path in inside {
        let manifest = |path: &Path| {
            let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
            ["yaml", "yml", "json"].contains(&extension)
        };
        if path.is_dir() && depth > 0 {
            find(&path, depth - 1, files)?;
        } else if manifest(&path) {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_objects_are_read_and_bad_ones_have_their_place() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("a.yaml"),
            "{kind: Service, metadata: {name: a}, spec: {ports: []}}\n---\n{kind: Service}\n---\n\
             {kind: Service, metadata: {name: b}, spec: {ports: 3}}\n---\n{kind: Deployment}\n",
        )
        .unwrap();
        fs::write(
            dir.path().join("b.json"),
            r#"{"kind": "NodeList", "items": [{"metadata": {"name": "n"}}]}"#,
        )
        .unwrap();
        fs::write(dir.path().join("c.yaml"), "kind: Service\nmetadata: [\n").unwrap();
        fs::write(dir.path().join("notes.txt"), "kind: [").unwrap();
        let mut found = Manifests::read(&[dir.path().to_owned()]).unwrap();
        assert_eq!((found.objects.services.len(), found.nodes.len()), (1, 1));
        assert_eq!(found.problems.len(), 3, "{:?}", found.problems);
        for (problem, part) in
            found.problems.iter().zip(["a.yaml: document 2", "a.yaml: document 3", "c.yaml: line"])
        {
            assert!(problem.contains(part), "{problem}");
        }
        found.choose_node(Some("other")).unwrap();
        assert!(found.objects.node.is_none());
        found.choose_node(None).unwrap();
        assert!(found.objects.node.is_some());
        assert!(Manifests::read(&[dir.path().join("none")]).is_err());
    }
}
