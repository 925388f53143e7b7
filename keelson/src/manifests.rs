//! Services, EndpointSlices, ServiceCIDRs, Nodes and Pods from manifests, for commands that ask no API.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    io::{self, Read},
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
/// The names of files in a folder that are manifests end like this.
const EXTENSIONS: [&str; 3] = ["yaml", "yml", "json"];

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
    /// Reads files and folders, and standard input for `-`; what is wrong in one of them, or in
    /// what a folder holds, leaves the others.
    ///
    /// # Errors
    /// When one of these can't be read.
    pub(crate) fn read(paths: &[PathBuf]) -> anyhow::Result<Self> {
        let mut manifests = Self::default();
        for path in paths {
            let context = || format!("read {}", path.display());
            if path.as_os_str() == "-" {
                let mut text = Vec::new();
                let most = LIMITS.bytes as u64 + 1;
                io::stdin().take(most).read_to_end(&mut text).with_context(context)?;
                manifests.take_text("standard input", &text);
            } else if fs::metadata(path).with_context(context)?.is_dir() {
                let mut found = Found::default();
                found.look_into(path, FOLDERS).with_context(context)?;
                if found.files.is_empty() && found.problems.is_empty() {
                    let problem =
                        format!("{}: no .yaml, .yml or .json file is there", path.display());
                    manifests.problems.push(problem);
                }
                manifests.problems.append(&mut found.problems);
                for file in found.files {
                    match bounded::read(&file, LIMITS.bytes) {
                        Ok(text) => manifests.take_text(&file.display().to_string(), &text),
                        Err(error) => {
                            manifests.problems.push(format!("{}: {error}", file.display()));
                        }
                    }
                }
            } else {
                let text = bounded::read(path, LIMITS.bytes).with_context(context)?;
                manifests.take_text(&path.display().to_string(), &text);
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

    fn take_text(&mut self, file: &str, text: &[u8]) {
        match yaml::documents(text, LIMITS) {
            Ok(documents) => {
                for (n, document) in documents.into_iter().enumerate() {
                    self.take(&format!("{file}: document {}", n + 1), document);
                }
            }
            Err(error) => self.problems.push(format!("{file}: {error}")),
        }
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
            "ServiceCIDR" => self.keep(place, &kind, document, |m| &mut m.objects.service_cidrs),
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
        if !["Node", "ServiceCIDR"].contains(&kind) && metadata.namespace.is_none() {
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

/// What folders hold.
#[derive(Default)]
struct Found {
    files: Vec<PathBuf>,
    problems: Vec<String>,
    /// Folders that were looked into: links may lead back.
    folders: BTreeSet<PathBuf>,
}

impl Found {
    /// Finds the manifests in a folder and those in it.
    fn look_into(&mut self, folder: &Path, depth: usize) -> io::Result<()> {
        if !self.folders.insert(folder.canonicalize()?) {
            return Ok(());
        }
        let inside: io::Result<Vec<PathBuf>> =
            fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect();
        let mut inside = inside?;
        inside.sort_unstable();
        for path in inside {
            let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
            let manifest = EXTENSIONS.contains(&extension);
            let looked = fs::metadata(&path).and_then(|file| {
                if file.is_dir() && depth > 0 {
                    return self.look_into(&path, depth - 1);
                }
                // From a pipe nothing might ever come.
                if manifest && file.is_file() {
                    self.files.push(path.clone());
                }
                Ok(())
            });
            match looked {
                Err(error) if manifest || error.kind() != io::ErrorKind::NotFound => {
                    self.problems.push(format!("{}: {error}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_objects_are_read_and_bad_ones_have_their_place() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("a.yaml"),
            "{kind: ServiceCIDR, metadata: {name: c}, spec: {cidrs: [10.96.0.0/16]}}\n---\n\
             {kind: Service, metadata: {name: a}, spec: {ports: []}}\n---\n{kind: Service}\n---\n\
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
        let ranges = &found.objects.service_cidrs;
        assert_eq!(ObjectKey::of(&ranges[0].metadata).to_string(), "c", "it is in no namespace");
        assert_eq!(found.problems.len(), 3, "{:?}", found.problems);
        for (problem, part) in
            found.problems.iter().zip(["a.yaml: document 3", "a.yaml: document 4", "c.yaml: line"])
        {
            assert!(problem.contains(part), "{problem}");
        }
        found.choose_node(Some("other")).unwrap();
        assert!(found.objects.node.is_none());
        found.choose_node(None).unwrap();
        assert!(found.objects.node.is_some());
        assert!(Manifests::read(&[dir.path().join("none")]).is_err());
    }

    #[test]
    fn what_a_folder_holds_besides_leaves_its_manifests() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let problems = |path: PathBuf| Manifests::read(&[path]).unwrap().problems;
        fs::create_dir(path("empty")).unwrap();
        let [problem] = &problems(path("empty"))[..] else { panic!() };
        assert!(problem.contains("empty: no .yaml, .yml or .json file"), "{problem}");

        fs::create_dir(path("full")).unwrap();
        fs::write(path("full/a.yaml"), "{kind: Service, metadata: {name: a}}").unwrap();
        fs::write(path("full/b.json"), [0xff; 1 << 20]).unwrap();
        nix::unistd::mkfifo(&path("full/c.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink("nowhere", path("full/d.yaml")).unwrap();
        std::os::unix::fs::symlink(".", path("full/again")).unwrap();
        let found = Manifests::read(&[path("full")]).unwrap();
        assert_eq!(found.objects.services.len(), 1);
        let [link, junk] = &found.problems[..] else { panic!("{:?}", found.problems) };
        assert!(link.contains("d.yaml: No such file"), "{link}");
        assert!(junk.contains("b.json: not text in UTF-8"), "{junk}");
    }
}
