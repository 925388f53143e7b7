//! Label and field selectors, in the two forms that Kubernetes has: as text in a query
//! (`app=web,tier in (a, b),!old`) and as an object in a spec.
//!
//! Grammar and meaning: the Kubernetes page "Labels and Selectors".

use std::{collections::BTreeMap, fmt};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector as ApiLabelSelector;

/// The selector can't be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unable to parse requirement: {0}")]
pub struct SelectorError(String);

/// One condition on one label.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    operator: Operator,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Operator {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
    GreaterThan(i64),
    LessThan(i64),
}

/// A set of conditions on labels, all of which must hold.
///
/// The empty selector ([`Default`]) selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
}

impl LabelSelector {
    /// Reads the text form.
    ///
    /// # Errors
    /// When it does not follow the documented grammar or a key or value is not a valid label's.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut parser = Parser { rest: text };
        let mut requirements = Vec::new();
        parser.skip_spaces();
        while !parser.rest.is_empty() {
            requirements.push(parser.requirement()?);
            parser.skip_spaces();
            if parser.rest.is_empty() {
                break;
            }
            if !parser.take(",") {
                return Err(parser.unexpected("',' or the end"));
            }
            parser.skip_spaces();
            if parser.rest.is_empty() {
                return Err(parser.unexpected("a label key after ','"));
            }
        }
        Ok(Self { requirements })
    }

    /// Reads the object form (`matchLabels`, `matchExpressions`).
    ///
    /// # Errors
    /// When an operator is unknown or has values where it may have none, or none where it needs
    /// some.
    pub fn from_k8s(selector: &ApiLabelSelector) -> Result<Self, SelectorError> {
        let mut requirements = Vec::new();
        for (key, value) in selector.match_labels.iter().flatten() {
            requirements.push(Requirement {
                key: valid_key(key)?.to_owned(),
                operator: Operator::In(vec![valid_value(value)?.to_owned()]),
            });
        }
        for expression in selector.match_expressions.iter().flatten() {
            requirements.push(requirement(
                &expression.key,
                &expression.operator,
                expression.values.as_deref().unwrap_or_default(),
            )?);
        }
        Ok(Self { requirements })
    }

    /// Makes one condition out of a node selector's parts (`In`, `NotIn`, `Exists`,
    /// `DoesNotExist`, `Gt`, `Lt`) and adds it.
    ///
    /// # Errors
    /// As [`LabelSelector::from_k8s`].
    pub fn and(
        mut self,
        key: &str,
        operator: &str,
        values: &[String],
    ) -> Result<Self, SelectorError> {
        self.requirements.push(requirement(key, operator, values)?);
        Ok(self)
    }

    /// A selector for exactly these labels.
    pub fn from_labels<'a>(labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> Self {
        let requirements = labels
            .into_iter()
            .map(|(key, value)| Requirement {
                key: key.clone(),
                operator: Operator::In(vec![value.clone()]),
            })
            .collect();
        Self { requirements }
    }

    /// Whether it selects everything because it asks for nothing.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    /// Whether the labels meet all conditions.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.matches_with(|key| labels.get(key).map(String::as_str))
    }

    /// Whether labels that are looked up by `get` meet all conditions.
    pub fn matches_with<'a>(&self, get: impl Fn(&str) -> Option<&'a str>) -> bool {
        self.requirements.iter().all(|requirement| {
            let value = get(&requirement.key);
            match &requirement.operator {
                Operator::In(values) => value.is_some_and(|v| values.iter().any(|x| x == v)),
                Operator::NotIn(values) => !value.is_some_and(|v| values.iter().any(|x| x == v)),
                Operator::Exists => value.is_some(),
                Operator::DoesNotExist => value.is_none(),
                Operator::GreaterThan(bound) => number(value).is_some_and(|v| v > *bound),
                Operator::LessThan(bound) => number(value).is_some_and(|v| v < *bound),
            }
        })
    }
}

fn number(value: Option<&str>) -> Option<i64> {
    value?.parse().ok()
}

fn requirement(key: &str, operator: &str, values: &[String]) -> Result<Requirement, SelectorError> {
    let key = valid_key(key)?.to_owned();
    let values =
        values.iter().map(|v| valid_value(v).map(str::to_owned)).collect::<Result<Vec<_>, _>>()?;
    let one_number = || match values.as_slice() {
        [value] => value.parse().map_err(|_| {
            SelectorError(format!("for {operator:?} operator, the value must be an integer"))
        }),
        _ => {
            Err(SelectorError(format!("for {operator:?} operator, exactly one value is required")))
        }
    };
    let operator = match operator {
        "In" | "NotIn" if values.is_empty() => {
            return Err(SelectorError(format!(
                "for {operator:?} operator on key {key:?}, values set can't be empty"
            )));
        }
        "Exists" | "DoesNotExist" if !values.is_empty() => {
            return Err(SelectorError(format!(
                "values set must be empty for {operator:?} operator on key {key:?}"
            )));
        }
        "In" => Operator::In(values),
        "NotIn" => Operator::NotIn(values),
        "Exists" => Operator::Exists,
        "DoesNotExist" => Operator::DoesNotExist,
        "Gt" => Operator::GreaterThan(one_number()?),
        "Lt" => Operator::LessThan(one_number()?),
        other => {
            return Err(SelectorError(format!("{other:?} is not a valid label selector operator")));
        }
    };
    Ok(Requirement { key, operator })
}

fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    !bytes.is_empty()
        && bytes.len() <= 63
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && bytes[0].is_ascii_alphanumeric()
        && bytes[bytes.len() - 1].is_ascii_alphanumeric()
}

fn valid_key(key: &str) -> Result<&str, SelectorError> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    let prefix_ok = prefix.is_none_or(|prefix| {
        prefix.len() <= 253 && prefix.split('.').all(|part| is_name(part) && !part.contains('_'))
    });
    if prefix_ok && is_name(name) {
        Ok(key)
    } else {
        Err(SelectorError(format!(
            "{key:?} is not a label key: a name of at most 63 letters, digits, '-', '_' and '.' is \
             needed, with an optional DNS prefix and '/'"
        )))
    }
}

fn valid_value(value: &str) -> Result<&str, SelectorError> {
    if value.is_empty() || is_name(value) {
        Ok(value)
    } else {
        Err(SelectorError(format!(
            "{value:?} is not a label value: at most 63 letters, digits, '-', '_' and '.' are \
             allowed, beginning and ending with a letter or digit"
        )))
    }
}

struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn skip_spaces(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn take(&mut self, token: &str) -> bool {
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn unexpected(&self, wanted: &str) -> SelectorError {
        let found: String = self.rest.chars().take(20).collect();
        SelectorError(if found.is_empty() {
            format!("found the end, expected: {wanted}")
        } else {
            format!("found '{found}', expected: {wanted}")
        })
    }

    fn word(&mut self) -> &'a str {
        let end = self
            .rest
            .find(|c: char| {
                c.is_whitespace() || matches!(c, '=' | '!' | ',' | '(' | ')' | '<' | '>')
            })
            .unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word
    }

    fn requirement(&mut self) -> Result<Requirement, SelectorError> {
        if self.take("!") {
            self.skip_spaces();
            let key = valid_key(self.word())?.to_owned();
            return Ok(Requirement { key, operator: Operator::DoesNotExist });
        }
        let word = self.word();
        if word.is_empty() {
            return Err(self.unexpected("a label key"));
        }
        let key = valid_key(word)?.to_owned();
        self.skip_spaces();
        let operator = if self.take("==") || self.take("=") {
            Operator::In(vec![self.value()?])
        } else if self.take("!=") {
            Operator::NotIn(vec![self.value()?])
        } else if self.take(">") {
            Operator::GreaterThan(self.integer()?)
        } else if self.take("<") {
            Operator::LessThan(self.integer()?)
        } else if self.rest.is_empty() || self.rest.starts_with(',') {
            Operator::Exists
        } else {
            match self.word() {
                "in" => Operator::In(self.values()?),
                "notin" => Operator::NotIn(self.values()?),
                other => {
                    return Err(SelectorError(format!(
                        "found '{other}', expected: in, notin, =, ==, !=, gt, lt"
                    )));
                }
            }
        };
        Ok(Requirement { key, operator })
    }

    fn value(&mut self) -> Result<String, SelectorError> {
        self.skip_spaces();
        let word = self.word();
        valid_value(word).map(str::to_owned)
    }

    fn integer(&mut self) -> Result<i64, SelectorError> {
        let value = self.value()?;
        value.parse().map_err(|_| SelectorError(format!("{value:?} is not an integer")))
    }

    fn values(&mut self) -> Result<Vec<String>, SelectorError> {
        self.skip_spaces();
        if !self.take("(") {
            return Err(self.unexpected("'('"));
        }
        let mut values = Vec::new();
        loop {
            values.push(self.value()?);
            self.skip_spaces();
            if self.take(")") {
                return Ok(values);
            }
            if !self.take(",") {
                return Err(self.unexpected("',' or ')'"));
            }
        }
    }
}

impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Requirement { key, operator }) in self.requirements.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            match operator {
                Operator::In(values) if values.len() == 1 => write!(f, "{key}={}", values[0])?,
                Operator::NotIn(values) if values.len() == 1 => write!(f, "{key}!={}", values[0])?,
                Operator::In(values) => write!(f, "{key} in ({})", values.join(","))?,
                Operator::NotIn(values) => write!(f, "{key} notin ({})", values.join(","))?,
                Operator::Exists => f.write_str(key)?,
                Operator::DoesNotExist => write!(f, "!{key}")?,
                Operator::GreaterThan(bound) => write!(f, "{key}>{bound}")?,
                Operator::LessThan(bound) => write!(f, "{key}<{bound}")?,
            }
        }
        Ok(())
    }
}

/// A set of conditions on fields, all of which must hold: `status.phase=Running,metadata.name!=x`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector {
    requirements: Vec<FieldRequirement>,
}

/// One condition on one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldRequirement {
    /// The field's path, `metadata.name`.
    pub field: String,
    /// The value it is compared with.
    pub value: String,
    /// Whether they must be equal, or must differ.
    pub equal: bool,
}

impl FieldSelector {
    /// Reads the text form. A backslash takes the meaning from `,`, `=` and `\` in a value.
    ///
    /// # Errors
    /// When a condition has no `=`, `==` or `!=`.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut requirements = Vec::new();
        for term in split_unescaped(text) {
            if term.is_empty() {
                continue;
            }
            let invalid =
                || SelectorError(format!("invalid selector: '{text}'; can't understand '{term}'"));
            let at = term.find('=').ok_or_else(invalid)?;
            let (field, equal) = match term[..at].strip_suffix('!') {
                Some(field) => (field, false),
                None => (&term[..at], true),
            };
            let value = &term[at + 1..];
            let value = if equal { value.strip_prefix('=').unwrap_or(value) } else { value };
            let value = unescape(value).ok_or_else(invalid)?;
            requirements.push(FieldRequirement { field: field.to_owned(), value, equal });
        }
        Ok(Self { requirements })
    }

    /// Whether it selects everything because it asks for nothing.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    /// The conditions.
    pub fn requirements(&self) -> &[FieldRequirement] {
        &self.requirements
    }

    /// The value that a field must have, if the selector says so.
    pub fn required_value(&self, field: &str) -> Option<&str> {
        self.requirements.iter().find(|r| r.equal && r.field == field).map(|r| r.value.as_str())
    }

    /// Whether an object whose fields `get` looks up meets all conditions. A field that `get` does
    /// not know counts as empty.
    pub fn matches(&self, get: impl Fn(&str) -> Option<String>) -> bool {
        self.requirements.iter().all(|r| (get(&r.field).unwrap_or_default() == r.value) == r.equal)
    }
}

fn split_unescaped(text: &str) -> Vec<&str> {
    let mut terms = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b',' => {
                terms.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    terms.push(&text[start..]);
    terms
}

fn unescape(value: &str) -> Option<String> {
    let mut out = String::with_capacity(value.len());
    let mut characters = value.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => out.push(characters.next().filter(|c| matches!(c, '\\' | ',' | '='))?),
            ',' | '=' => return None,
            other => out.push(other),
        }
    }
    Some(out)
}

impl fmt::Display for FieldSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, r) in self.requirements.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            let operator = if r.equal { "=" } else { "!=" };
            let value = r.value.replace('\\', "\\\\").replace(',', "\\,").replace('=', "\\=");
            write!(f, "{comma}{}{operator}{value}", r.field)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn text_selectors_match_as_documented() {
        let web = labels(&[("app", "web"), ("tier", "front"), ("n", "5")]);
        for (text, expected) in [
            ("", true),
            ("app", true),
            ("!app", false),
            ("! other", true),
            ("app=web", true),
            ("app==web", true),
            ("app != web", false),
            ("other!=x", true),
            ("app in (web, db), tier notin (back)", true),
            ("app in (db)", false),
            ("other notin (a)", true),
            ("n>4,n<6", true),
            ("n>5", false),
            ("app=", false),
            ("example.com/x=1", false),
        ] {
            let selector = LabelSelector::parse(text).unwrap();
            assert_eq!(selector.matches(&web), expected, "{text:?}");
            assert_eq!(LabelSelector::parse(&selector.to_string()).unwrap(), selector);
        }
    }

    #[test]
    fn bad_text_selectors_are_refused() {
        for text in
            ["app=web,", ",", "app in web", "app in (a", "=x", "a b", "-a=1", "a=b=c", "n>x"]
        {
            assert!(LabelSelector::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn object_selectors_match_as_documented() {
        let selector: ApiLabelSelector = serde_json::from_value(serde_json::json!({
            "matchLabels": {"app": "web"},
            "matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["back"]}]
        }))
        .unwrap();
        let selector = LabelSelector::from_k8s(&selector).unwrap();
        assert!(selector.matches(&labels(&[("app", "web")])));
        assert!(!selector.matches(&labels(&[("app", "web"), ("tier", "back")])));
    }

    #[test]
    fn field_selectors_match_as_documented() {
        let get = |field: &str| match field {
            "status.phase" => Some("Running".to_owned()),
            "metadata.name" => Some("a,b".to_owned()),
            _ => None,
        };
        for (text, expected) in [
            ("status.phase=Running", true),
            ("status.phase==Running,metadata.name!=x", true),
            ("status.phase!=Running", false),
            ("metadata.name=a\\,b", true),
            ("spec.nodeName=", true),
        ] {
            let selector = FieldSelector::parse(text).unwrap();
            assert_eq!(selector.matches(get), expected, "{text:?}");
            assert_eq!(FieldSelector::parse(&selector.to_string()).unwrap(), selector);
        }
        assert!(FieldSelector::parse("status.phase").is_err());
    }

    proptest! {
        #[test]
        fn parsers_never_panic(text in "\\PC*") {
            let _ = LabelSelector::parse(&text);
            let _ = FieldSelector::parse(&text);
        }
    }
}
