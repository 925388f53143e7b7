//! Manifests from outside, read within bounds.
//!
//! Kubernetes reads YAML 1.1 (`yes` is a boolean, `0644` is octal) or JSON, with several documents
//! in one stream. A manifest comes from a person or a stranger: it is bounded in size, depth and
//! in what its aliases may grow to, and a key that stands twice is an error rather than a surprise.

use serde_json::Value;

/// How much a stream of manifests may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of text.
    pub bytes: usize,
    /// Values nested in values.
    pub depth: usize,
    /// Values in all documents, with aliases counted as often as they are used.
    pub nodes: usize,
    /// Documents.
    pub documents: usize,
}

impl Default for Limits {
    /// 3 MiB, as the API server takes in one request; enough for any real manifest.
    fn default() -> Self {
        Self { bytes: 3 << 20, depth: 64, nodes: 200_000, documents: 1_000 }
    }
}

/// The text is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum YamlError {
    /// More than the limits allow.
    #[error("{0}")]
    TooLarge(String),
    /// Not UTF-8.
    #[error("not text in UTF-8: the first bad byte is at offset {0}")]
    NotText(usize),
    /// A key stands twice.
    #[error("line {line}: key {key:?} stands here for a second time")]
    Repeated {
        /// Where it stands again, counted from 1.
        line: usize,
        /// The key.
        key: String,
    },
    /// Not YAML.
    #[error("line {line}: {reason}")]
    Syntax {
        /// Counted from 1.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
}

/// Reads all documents of a YAML or JSON stream; empty ones are left out.
///
/// # Errors
/// When the text is not valid, holds a key twice or is larger than `limits` allow.
pub fn documents(text: &[u8], limits: Limits) -> Result<Vec<Value>, YamlError> {
    read(text, limits, serde_saphyr::DuplicateKeyPolicy::Error)
}

fn read(
    text: &[u8],
    limits: Limits,
    duplicates: serde_saphyr::DuplicateKeyPolicy,
) -> Result<Vec<Value>, YamlError> {
    if text.len() > limits.bytes {
        return Err(YamlError::TooLarge(format!(
            "{} bytes are more than the {} that are read",
            text.len(),
            limits.bytes
        )));
    }
    let text = std::str::from_utf8(text).map_err(|e| YamlError::NotText(e.valid_up_to()))?;
    let documents: Vec<Value> =
        serde_saphyr::from_multiple_with_options(text, options(limits, duplicates))
            .map_err(|error| syntax(&error))?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

/// Reads exactly one document.
///
/// # Errors
/// As [`documents`], and when there is none or more than one.
pub fn document(text: &[u8], limits: Limits) -> Result<Value, YamlError> {
    one(documents(text, limits)?)
}

/// Reads exactly one document, in which a key may stand twice: the last one counts, and where the
/// first repetition is comes with the document. So config files of old releases are read.
///
/// # Errors
/// As [`document`], but for repeated keys.
pub fn lenient_document(
    text: &[u8],
    limits: Limits,
) -> Result<(Value, Option<YamlError>), YamlError> {
    match document(text, limits) {
        Ok(document) => Ok((document, None)),
        Err(error @ YamlError::Repeated { .. }) => {
            let documents = read(text, limits, serde_saphyr::DuplicateKeyPolicy::LastWins)?;
            Ok((one(documents)?, Some(error)))
        }
        Err(error) => Err(error),
    }
}

fn one(mut all: Vec<Value>) -> Result<Value, YamlError> {
    match (all.pop(), all.len()) {
        (Some(one), 0) => Ok(one),
        (None, _) => Err(YamlError::Syntax { line: 1, reason: "nothing in it".to_owned() }),
        (Some(_), more) => Err(YamlError::Syntax {
            line: 1,
            reason: format!("{} documents where one is wanted", more + 1),
        }),
    }
}

/// A value as one document.
///
/// # Errors
/// Never with values that came from JSON.
pub fn text(value: &Value) -> Result<String, YamlError> {
    serde_saphyr::to_string(value)
        .map_err(|error| YamlError::Syntax { line: 1, reason: error.to_string() })
}

fn options(limits: Limits, duplicates: serde_saphyr::DuplicateKeyPolicy) -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: limits.depth,
            max_nodes: limits.nodes,
            max_events: limits.nodes.saturating_mul(2),
            max_documents: limits.documents,
            max_total_scalar_bytes: limits.bytes.saturating_mul(4),
        },
        duplicate_keys: duplicates,
        legacy_octal_numbers: true,
    }
}

fn syntax(error: &serde_saphyr::Error) -> YamlError {
    let line = error.location().map_or(1, |location| location.line() as usize);
    if let serde_saphyr::Error::DuplicateMappingKey { key, .. } = error.without_snippet() {
        return YamlError::Repeated { line, key: key.clone().unwrap_or_default() };
    }
    // The library's text repeats the place and a snippet over several lines; one line is enough.
    let text = error.without_snippet().to_string();
    let reason = text.lines().next().unwrap_or_default().to_owned();
    YamlError::Syntax { line, reason }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_what_kubernetes_reads() {
        let text = b"# a comment\n---\nmode: 0644\nyes: no\ns: \"yes\"\nn: null\nl: [1, 2.5, a]\n---\n---\n{\"json\": true}\n";
        assert_eq!(
            documents(text, Limits::default()).unwrap(),
            [
                json!({"mode": 420, "yes": false, "s": "yes", "n": null, "l": [1, 2.5, "a"]}),
                json!({"json": true})
            ]
        );
    }

    #[test]
    fn keeps_block_scalars_and_quoted_numbers() {
        let text = b"a: |\n  one\n  two\nb: '8080'\nc: >-\n  x\n  y\n";
        assert_eq!(
            document(text, Limits::default()).unwrap(),
            json!({"a": "one\ntwo\n", "b": "8080", "c": "x y"})
        );
    }

    #[test]
    fn names_the_line_of_an_error() {
        let error = document(b"a: 1\nb: [1,\nc: }\n", Limits::default()).unwrap_err();
        assert!(matches!(error, YamlError::Syntax { line: 2..=3, .. }), "{error}");
        let error = document(b"a: 1\nb: 2\na: 3\n", Limits::default()).unwrap_err();
        assert_eq!(error.to_string(), "line 3: key \"a\" stands here for a second time");
    }

    #[test]
    fn a_lenient_document_may_repeat_a_key_and_nothing_else() {
        let (found, repeated) = lenient_document(b"a: 1\nb: 2\na: 3\n", Limits::default()).unwrap();
        assert_eq!(found, json!({"a": 3, "b": 2}));
        assert_eq!(
            repeated.unwrap().to_string(),
            "line 3: key \"a\" stands here for a second time"
        );
        assert_eq!(lenient_document(b"a: 1\n", Limits::default()).unwrap().1, None);
        assert!(lenient_document(b"a: [\n", Limits::default()).is_err());
    }

    #[test]
    fn what_is_written_is_read_back() {
        let value = json!({"a": "yes", "b": "", "c": ["0.0.0.0/0", "::/0"], "d": {"e": "24h0m0s",
            "f": false, "g": 14, "h": {}, "i": []}, "j": "[::]:10249", "k": "0x10"});
        let text = text(&value).unwrap();
        assert_eq!(document(text.as_bytes(), Limits::default()).unwrap(), value, "{text}");
    }

    #[test]
    fn refuses_bombs_depth_and_size() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            let previous = level - 1;
            let aliases = vec![format!("*a{previous}"); 10].join(", ");
            bomb.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
        }
        assert!(documents(bomb.as_bytes(), Limits::default()).is_err());
        assert!(documents("[".repeat(10_000).as_bytes(), Limits::default()).is_err());
        let limits = Limits { bytes: 10, ..Limits::default() };
        assert!(matches!(documents(b"a: 0123456789", limits), Err(YamlError::TooLarge(_))));
        assert_eq!(documents(b"a: \xff", Limits::default()), Err(YamlError::NotText(3)));
    }

    proptest! {
        #[test]
        fn never_panics(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = documents(&text, Limits::default());
        }
    }
}
