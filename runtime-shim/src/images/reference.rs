//! The names of images: `[registry/]repository[:tag][@digest]`.

use std::fmt;

use crate::runtime::{Result, RuntimeError};

/// Registries' own limit on the length of a repository's name.
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// A `sha256:…` digest: the algorithm and 64 lower-case hexadecimal digits.
///
/// It becomes part of paths, so it exists only in this checked form.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Digest(String);

impl Digest {
    /// Takes `sha256:<64 hexadecimal digits>`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let Some((algorithm, hex)) = text.split_once(':') else {
            return Err(format!("digest {text:?} has no algorithm"));
        };
        if algorithm != "sha256" {
            return Err(format!("digest algorithm {algorithm:?} is not supported, only sha256 is"));
        }
        Self::from_hex(hex).ok_or_else(|| format!("digest {text:?} is not 64 hexadecimal digits"))
    }

    /// Takes the 64 hexadecimal digits alone.
    pub(crate) fn from_hex(hex: &str) -> Option<Self> {
        let lower_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        (hex.len() == 64 && hex.bytes().all(lower_hex)).then(|| Self(format!("sha256:{hex}")))
    }

    /// With its algorithm, as it stands in manifests.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The hexadecimal digits, as they stand in paths.
    pub(crate) fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A parsed image name. A name without tag and digest means the tag `latest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ImageName {
    /// `host[:port]`, if the name says one.
    pub(crate) registry: Option<String>,
    /// The repository in the registry.
    pub(crate) repository: String,
    /// The tag, if one is given or none is and there is no digest either.
    pub(crate) tag: Option<String>,
    /// The digest of the manifest, if one is given. It wins over the tag.
    pub(crate) digest: Option<Digest>,
}

impl ImageName {
    /// Parses a name; the error is `InvalidImageName`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        Self::try_parse(text).map_err(|reason| RuntimeError::InvalidImageName {
            image: text.chars().take(MAX_NAME + MAX_TAG).collect(),
            reason,
        })
    }

    fn try_parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("it is empty".into());
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::parse(digest)?)),
            None => (text, None),
        };
        // A colon after the last slash begins the tag; before it, it is the registry's port.
        let tag_at = rest.rfind(':').filter(|at| !rest[*at..].contains('/'));
        let (name, tag) = match tag_at {
            Some(at) => (&rest[..at], Some(&rest[at + 1..])),
            None => (rest, None),
        };
        if let Some(tag) = tag {
            check_tag(tag)?;
        }
        let (registry, repository) = match name.split_once('/') {
            Some((first, repository)) if names_a_registry(first) => {
                check_registry(first)?;
                (Some(first.to_owned()), repository)
            }
            _ => (None, name),
        };
        check_repository(repository)?;
        let tag = match (tag, &digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, None) => Some("latest".to_owned()),
            (None, Some(_)) => None,
        };
        Ok(Self { registry, repository: repository.to_owned(), tag, digest })
    }

    /// The same name in the default registry, if it names none and there is a default.
    ///
    /// The default is `host[:port]`, with a path that goes before names of one component, if the
    /// registry has such a home for them: `host/library`.
    pub(crate) fn in_default_registry(&self, default: Option<&str>) -> Option<Self> {
        if self.registry.is_some() {
            return Some(self.clone());
        }
        let (host, home) = match default?.split_once('/') {
            Some((host, home)) => (host, Some(home)),
            None => (default?, None),
        };
        let repository = match home {
            Some(home) if !self.repository.contains('/') => format!("{home}/{}", self.repository),
            _ => self.repository.clone(),
        };
        Some(Self { registry: Some(host.to_owned()), repository, ..self.clone() })
    }

    /// `[registry/]repository`.
    pub(crate) fn name(&self) -> String {
        match &self.registry {
            Some(registry) => format!("{registry}/{}", self.repository),
            None => self.repository.clone(),
        }
    }

    /// `name:tag`, if it has a tag.
    pub(crate) fn tagged(&self) -> Option<String> {
        self.tag.as_ref().map(|tag| format!("{}:{tag}", self.name()))
    }

    /// `name@digest` for the given digest.
    pub(crate) fn with_digest(&self, digest: &Digest) -> String {
        format!("{}@{digest}", self.name())
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// The convention of all clients: a first component with a dot or a colon, or `localhost`, is a
/// host; anything else is part of the repository.
fn names_a_registry(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':'])
}

fn check_registry(host: &str) -> Result<(), String> {
    let (name, port) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) => {
            address
                .parse::<std::net::Ipv6Addr>()
                .map_err(|_| format!("registry {host:?} is not a valid address"))?;
            return match rest.strip_prefix(':') {
                _ if rest.is_empty() => Ok(()),
                Some(port) if port.parse::<u16>().is_ok() => Ok(()),
                _ => Err(format!("registry {host:?} has an invalid port")),
            };
        }
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        },
    };
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return Err(format!("registry {host:?} has an invalid port"));
    }
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() <= 253 && name.split('.').all(label) {
        Ok(())
    } else {
        Err(format!("registry {host:?} is not a valid host name"))
    }
}

/// Components of lower-case letters and digits, joined by one `.`, one or two `_`, or dashes
/// (distribution specification, "pulling manifests").
fn check_repository(repository: &str) -> Result<(), String> {
    if repository.is_empty() {
        return Err("the repository is missing".into());
    }
    if repository.len() > MAX_NAME {
        return Err(format!("the repository has more than {MAX_NAME} characters"));
    }
    if repository.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("the repository must be in lower case".into());
    }
    let well_formed = |component: &str| {
        let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = component.as_bytes();
        let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
        if !alphanumeric(*first) || !alphanumeric(*last) {
            return false;
        }
        component
            .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            .filter(|separator| !separator.is_empty())
            .all(|s| matches!(s, "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
    };
    match repository.split('/').find(|component| !well_formed(component)) {
        None => Ok(()),
        Some(component) => Err(format!("the repository's part {component:?} is not valid")),
    }
}

fn check_tag(tag: &str) -> Result<(), String> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let valid = tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-');
    if valid { Ok(()) } else { Err(format!("tag {tag:?} is not valid")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "3c3a4604a545cdc127456d94e421cd355bca5b528f4a9c1905b15da2eb4a4c6b";

    #[test]
    fn names_parse_as_clients_do() {
        let digest = format!("sha256:{HEX}");
        for (text, registry, repository, tag) in [
            ("busybox", None, "busybox", Some("latest")),
            ("busybox:1.36", None, "busybox", Some("1.36")),
            ("team/app:v1", None, "team/app", Some("v1")),
            ("localhost/app", Some("localhost"), "app", Some("latest")),
            ("127.0.0.1:5000/a/b__c:x_1.-", Some("127.0.0.1:5000"), "a/b__c", Some("x_1.-")),
            ("reg.example/app-x--y.z", Some("reg.example"), "app-x--y.z", Some("latest")),
            ("[::1]:5000/app", Some("[::1]:5000"), "app", Some("latest")),
        ] {
            let name = ImageName::parse(text).unwrap();
            assert_eq!(
                (name.registry.as_deref(), name.repository.as_str(), name.tag.as_deref()),
                (registry, repository, tag),
                "{text}"
            );
        }
        let name = ImageName::parse(&format!("reg.example/app@{digest}")).unwrap();
        assert_eq!((name.tag, name.digest.unwrap().hex()), (None, HEX));
        let name = ImageName::parse(&format!("reg.example/app:v1@{digest}")).unwrap();
        assert_eq!(name.to_string(), format!("reg.example/app:v1@{digest}"));
    }

    #[test]
    fn what_is_not_a_name_is_refused() {
        for text in [
            "",
            ":",
            "/",
            "App",
            "a//b",
            "a/",
            "/a",
            "a:",
            "a:b:c/d",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "../a",
            "a/../b",
            "reg.example/",
            "reg.example:99999/a",
            "-x.example/a",
            "a@sha256:12",
            "a@md5:00",
            "a b",
            "a\n",
            "a:.b",
            "[::g]:1/a",
            "a@b@c",
        ] {
            assert!(ImageName::parse(text).is_err(), "{text:?}");
        }
        assert!(ImageName::parse(&"a".repeat(256)).is_err());
        assert!(ImageName::parse(&format!("a:{}", "t".repeat(129))).is_err());
    }

    #[test]
    fn short_names_go_to_the_default_registry() {
        let short = ImageName::parse("app").unwrap();
        assert_eq!(short.in_default_registry(None), None);
        for (default, name, full) in [
            ("reg.example", "app", "reg.example/app:latest"),
            ("reg.example:5000/library", "app:1", "reg.example:5000/library/app:1"),
            ("reg.example:5000/library", "team/app:1", "reg.example:5000/team/app:1"),
            ("reg.example", "localhost/app", "localhost/app:latest"),
        ] {
            let name = ImageName::parse(name).unwrap();
            assert_eq!(name.in_default_registry(Some(default)).unwrap().to_string(), full);
        }
    }

    proptest::proptest! {
        #[test]
        fn parsing_never_panics_and_prints_what_it_read(text in "[a-zA-Z0-9:/@._\\[\\]-]{0,80}") {
            if let Ok(name) = ImageName::parse(&text) {
                let again = ImageName::parse(&name.to_string());
                proptest::prop_assert_eq!(again.ok(), Some(name));
            }
        }
    }
}
