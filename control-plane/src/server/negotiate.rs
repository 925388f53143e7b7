//! Which form an answer takes: the `Accept` header.

use http::HeaderMap;

use crate::{discovery::AggregatedVersion, status::Status};

/// How bytes are made of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Encoding {
    #[default]
    Json,
    Yaml,
}

/// What is made of an object before it is encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Itself.
    #[default]
    Whole,
    /// Rows for people, as kubectl prints them.
    Table,
    /// Its metadata alone.
    Partial,
    /// Discovery of all groups in one document.
    AggregatedDiscovery(AggregatedVersion),
}

/// What the client gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Accepted {
    pub(crate) encoding: Encoding,
    pub(crate) shape: Shape,
    /// Indented, for people.
    pub(crate) pretty: bool,
}

const OFFERED: [&str; 2] = ["application/json", "application/yaml"];

/// The best that the client takes and that is served here; `shapes` are those that make sense for
/// this answer, besides the whole.
pub(crate) fn accept(
    headers: &HeaderMap,
    pretty: Option<&str>,
    shapes: &[Shape],
) -> Result<Accepted, Status> {
    let pretty = match pretty {
        Some(value) => !matches!(value, "false" | "0"),
        None => is_for_people(headers),
    };
    let mut best: Option<(u16, Accepted)> = None;
    let mut any = false;
    for value in headers.get_all(http::header::ACCEPT) {
        let text = value.to_str().unwrap_or_default();
        for range in text.split(',').map(str::trim).filter(|range| !range.is_empty()) {
            any = true;
            let Some((quality, encoding, shape)) = media_range(range, shapes) else { continue };
            // Of equals, the first.
            if quality > 0 && best.is_none_or(|(q, _)| quality > q) {
                best = Some((quality, Accepted { encoding, shape, pretty }));
            }
        }
    }
    match best {
        Some((_, accepted)) => Ok(accepted),
        None if any => Err(Status::not_acceptable(&OFFERED)),
        None => Ok(Accepted { pretty, ..Accepted::default() }),
    }
}

/// Quality in thousandths, and what it asks for; `None` if that is not served.
fn media_range(range: &str, shapes: &[Shape]) -> Option<(u16, Encoding, Shape)> {
    let mut parts = range.split(';').map(str::trim);
    let encoding = match parts.next()?.to_ascii_lowercase().as_str() {
        "application/json" | "*/*" | "application/*" => Encoding::Json,
        "application/yaml" | "application/x-yaml" | "text/yaml" => Encoding::Yaml,
        _ => return None,
    };
    let (mut quality, mut kind, mut group, mut version) = (1000, "", "", "");
    for parameter in parts {
        let (name, value) = parameter.split_once('=')?;
        match name.trim() {
            "q" => quality = (value.trim().parse::<f32>().ok()?.clamp(0.0, 1.0) * 1000.0) as u16,
            "as" => kind = value.trim(),
            "g" => group = value.trim(),
            "v" => version = value.trim(),
            _ => {}
        }
    }
    let shape = match (kind, group, version) {
        ("", ..) => Shape::Whole,
        ("Table", "meta.k8s.io", "v1") => Shape::Table,
        ("PartialObjectMetadata" | "PartialObjectMetadataList", "meta.k8s.io", "v1") => {
            Shape::Partial
        }
        ("APIGroupDiscoveryList", "apidiscovery.k8s.io", "v2") => {
            Shape::AggregatedDiscovery(AggregatedVersion::V2)
        }
        ("APIGroupDiscoveryList", "apidiscovery.k8s.io", "v2beta1") => {
            Shape::AggregatedDiscovery(AggregatedVersion::V2Beta1)
        }
        _ => return None,
    };
    (shape == Shape::Whole || shapes.contains(&shape)).then_some((quality, encoding, shape))
}

/// Who asks for nothing special with a tool for people gets indented JSON, as Kubernetes has it.
fn is_for_people(headers: &HeaderMap) -> bool {
    let agent = headers.get(http::header::USER_AGENT).and_then(|v| v.to_str().ok());
    agent.is_some_and(|agent| {
        ["curl", "Wget", "Mozilla/5.0"].iter().any(|tool| agent.starts_with(tool))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_is_served_is_taken() {
        let all = &[Shape::Table, Shape::Partial];
        let table = "application/json;as=Table;v=v1;g=meta.k8s.io,\
                     application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        let rows = [
            ("application/json", all.as_slice(), Some((Encoding::Json, Shape::Whole))),
            (table, all, Some((Encoding::Json, Shape::Table))),
            (table, &[], Some((Encoding::Json, Shape::Whole))),
            ("application/vnd.kubernetes.protobuf", all, None),
            (
                "application/vnd.kubernetes.protobuf,application/json",
                all,
                Some((Encoding::Json, Shape::Whole)),
            ),
            ("application/yaml", all, Some((Encoding::Yaml, Shape::Whole))),
            ("application/json;q=0.5, application/yaml", all, Some((Encoding::Yaml, Shape::Whole))),
            ("*/*", all, Some((Encoding::Json, Shape::Whole))),
            ("", all, Some((Encoding::Json, Shape::Whole))),
            ("text/html", all, None),
            (
                "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
                all,
                Some((Encoding::Json, Shape::Partial)),
            ),
        ];
        for (header, shapes, expected) in rows {
            let mut headers = HeaderMap::new();
            headers.insert("accept", header.parse().unwrap());
            let found = accept(&headers, None, shapes).ok().map(|a| (a.encoding, a.shape));
            assert_eq!(found, expected, "{header}");
        }
    }

    #[test]
    fn people_get_it_indented() {
        let mut headers = HeaderMap::new();
        assert!(!accept(&headers, None, &[]).unwrap().pretty);
        assert!(accept(&headers, Some("true"), &[]).unwrap().pretty);
        headers.insert("user-agent", "curl/8".parse().unwrap());
        assert!(accept(&headers, None, &[]).unwrap().pretty);
        assert!(!accept(&headers, Some("false"), &[]).unwrap().pretty);
    }
}
