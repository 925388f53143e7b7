//! JSON documents, with an eye on fields that come twice.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// No more than this many are told of.
const MOST_DUPLICATES: usize = 100;

/// Parses a document. Where a field comes twice the last one counts, as in Go; the paths of all
/// such fields are given beside.
///
/// # Errors
/// If it is not JSON, or nested deeper than 128.
pub(crate) fn parse_with_duplicates(
    document: &[u8],
) -> Result<(Value, Vec<String>), serde_json::Error> {
    let mut duplicates = Vec::new();
    let mut parser = serde_json::Deserializer::from_slice(document);
    let value = Reader { duplicates: &mut duplicates }.deserialize(&mut parser)?;
    parser.end()?;
    Ok((value, duplicates))
}

struct Reader<'a> {
    duplicates: &'a mut Vec<String>,
}

impl Reader<'_> {
    /// Puts a part in front of the paths that were found since there were `before`.
    fn prefix(&mut self, before: usize, part: impl Fn() -> String) {
        for path in self.duplicates.iter_mut().skip(before) {
            let joint = if path.starts_with('[') { "" } else { "." };
            *path = format!("{}{joint}{path}", part());
        }
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        loop {
            let before = self.duplicates.len();
            let Some(item) = items.next_element_seed(Reader { duplicates: self.duplicates })?
            else {
                return Ok(Value::Array(list));
            };
            let index = list.len();
            self.prefix(before, || format!("[{index}]"));
            list.push(item);
        }
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let before = self.duplicates.len();
            let value = entries.next_value_seed(Reader { duplicates: self.duplicates })?;
            self.prefix(before, || key.clone());
            if object.contains_key(&key) {
                if self.duplicates.len() >= MOST_DUPLICATES {
                    return Err(A::Error::custom("too many duplicate fields"));
                }
                if !self.duplicates.contains(&key) {
                    self.duplicates.push(key.clone());
                }
            }
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn duplicates_are_found_by_path() {
        let document = br#"{"a":1,"b":{"c":[{"d":1,"d":2},{"d":{"e":1,"e":2}}]},"a":2}"#;
        let (value, duplicates) = parse_with_duplicates(document).unwrap();
        assert_eq!(value, json!({"a": 2, "b": {"c": [{"d": 2}, {"d": {"e": 2}}]}}));
        assert_eq!(duplicates, ["b.c[0].d", "b.c[1].d.e", "a"]);
    }

    #[test]
    fn depth_is_bounded() {
        let document = "[".repeat(100_000);
        let error = parse_with_duplicates(document.as_bytes()).unwrap_err();
        assert!(error.to_string().contains("recursion limit"), "{error}");
    }

    #[test]
    fn numbers_stay_what_they_are() {
        let (value, _) = parse_with_duplicates(b"[1,-1,18446744073709551615,1.5]").unwrap();
        assert_eq!(value, json!([1, -1, u64::MAX, 1.5]));
    }
}
