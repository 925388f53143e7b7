//! The path of a field, built without allocation while an object is walked and written out only
//! when there is something to say.

use std::fmt;

/// A field's path (`spec.containers[0].name`), as a chain through the walker's stack frames.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Path<'a> {
    /// The object itself.
    Root,
    /// A field of an object.
    Field(&'a Path<'a>, &'a str),
    /// An item of a list.
    Index(&'a Path<'a>, usize),
    /// An entry of a map.
    Key(&'a Path<'a>, &'a str),
}

impl<'a> Path<'a> {
    pub(crate) fn field(&'a self, name: &'a str) -> Path<'a> {
        Path::Field(self, name)
    }

    pub(crate) fn index(&'a self, index: usize) -> Path<'a> {
        Path::Index(self, index)
    }

    pub(crate) fn key(&'a self, key: &'a str) -> Path<'a> {
        Path::Key(self, key)
    }

    /// As in messages of Go's strict JSON decoder, where map keys look like fields.
    pub(crate) fn as_go(&self) -> String {
        match self {
            Path::Root => String::new(),
            Path::Field(parent, name) | Path::Key(parent, name) => match parent.as_go() {
                parent if parent.is_empty() => (*name).to_owned(),
                parent => format!("{parent}.{name}"),
            },
            Path::Index(parent, index) => format!("{}[{index}]", parent.as_go()),
        }
    }

    /// As in messages of Go's JSON decoder, which names fields only.
    pub(crate) fn as_go_fields(&self) -> String {
        match self {
            Path::Root => String::new(),
            Path::Field(Path::Root, name) => (*name).to_owned(),
            Path::Field(parent, name) => format!("{}.{name}", parent.as_go_fields()),
            Path::Index(parent, _) | Path::Key(parent, _) => parent.as_go_fields(),
        }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Path::Root => Ok(()),
            Path::Field(Path::Root, name) => f.write_str(name),
            Path::Field(parent, name) => write!(f, "{parent}.{name}"),
            Path::Index(parent, index) => write!(f, "{parent}[{index}]"),
            Path::Key(parent, key) => write!(f, "{parent}[{key}]"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_read_as_in_kubernetes() {
        let spec = Path::Root.field("spec");
        let containers = spec.field("containers");
        let first = containers.index(0);
        assert_eq!(first.field("name").to_string(), "spec.containers[0].name");
        let metadata = Path::Root.field("metadata");
        assert_eq!(metadata.field("labels").key("a/b").to_string(), "metadata.labels[a/b]");
    }
}
