//! Rules that many kinds share, in Kubernetes' words (`apimachinery/pkg/util/validation`).

use std::{fmt, net::IpAddr};

use serde_json::Value;

use crate::{
    registry::{path::Path, value},
    status::FieldError,
};

pub(crate) const NOT_NEGATIVE: &str = "must be greater than or equal to 0";
pub(crate) const IMMUTABLE: &str = "field is immutable";

/// Why a text is no DNS label, if it is none (RFC 1123).
pub(crate) fn dns_label(text: &str) -> Option<String> {
    if text.len() > 63 {
        return Some("must be no more than 63 characters".to_owned());
    }
    (!is_label(text)).then(|| {
        "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', \
         and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', \
         regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
            .to_owned()
    })
}

fn is_label(text: &str) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    bytes.first().is_some_and(alphanumeric)
        && bytes.last().is_some_and(alphanumeric)
        && bytes.iter().all(|b| alphanumeric(b) || *b == b'-')
}

/// Why a text is no DNS name, if it is none (RFC 1123).
pub(crate) fn dns_subdomain(text: &str) -> Option<String> {
    if text.len() > 253 {
        return Some("must be no more than 253 characters".to_owned());
    }
    (!text.split('.').all(is_label)).then(|| {
        "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or \
         '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex \
         used for validation is \
         '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
            .to_owned()
    })
}

/// Why a text is no DNS label of the older kind, which starts with a letter (RFC 1035).
pub(crate) fn dns_1035_label(text: &str) -> Option<String> {
    if text.len() > 63 {
        return Some("must be no more than 63 characters".to_owned());
    }
    (!is_label(text) || text.starts_with(|c: char| c.is_ascii_digit())).then(|| {
        "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an \
         alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or \
         'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')"
            .to_owned()
    })
}

/// Why a text can't be a part of a path, if it can't.
pub(crate) fn path_segment(text: &str) -> Option<String> {
    match text {
        "." | ".." => Some(format!("may not be '{text}'")),
        _ => {
            ['/', '%'].iter().find(|c| text.contains(**c)).map(|c| format!("may not contain '{c}'"))
        }
    }
}

fn is_qualified_part(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// What is wrong with a key of labels or annotations (`prefix/name`).
pub(crate) fn qualified_name(text: &str) -> Vec<String> {
    let mut out = Vec::new();
    let name = match text.split_once('/') {
        None => text,
        Some((_, name)) if name.contains('/') => {
            return vec![
                "a qualified name must consist of alphanumeric characters, '-', '_' or '.', and \
                 must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name', \
                 or '123-abc', regex used for validation is \
                 '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]') with an optional DNS subdomain prefix \
                 and '/' (e.g. 'example.com/MyName')"
                    .to_owned(),
            ];
        }
        Some((prefix, name)) => {
            if prefix.is_empty() {
                out.push("prefix part must be non-empty".to_owned());
            } else if let Some(why) = dns_subdomain(prefix) {
                out.push(format!("prefix part {why}"));
            }
            name
        }
    };
    if name.is_empty() {
        out.push("name part must be non-empty".to_owned());
    } else if name.len() > 63 {
        out.push("name part must be no more than 63 characters".to_owned());
    }
    if !is_qualified_part(name) {
        out.push(
            "name part must consist of alphanumeric characters, '-', '_' or '.', and must start \
             and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', \
             regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
                .to_owned(),
        );
    }
    out
}

/// What is wrong with a label's value.
pub(crate) fn label_value(text: &str) -> Vec<String> {
    let mut out = Vec::new();
    if text.len() > 63 {
        out.push("must be no more than 63 characters".to_owned());
    }
    if !text.is_empty() && !is_qualified_part(text) {
        out.push(
            "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' \
             or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or \
             'my_value',  or '12345', regex used for validation is \
             '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
                .to_owned(),
        );
    }
    out
}

/// Checks a map of labels.
pub(crate) fn labels(value: Option<&Value>, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    for (key, label) in value.and_then(Value::as_object).into_iter().flatten() {
        for why in qualified_name(key) {
            errors.push(FieldError::invalid(path, key.as_str(), why));
        }
        let text = label.as_str().unwrap_or_default();
        for why in label_value(text) {
            errors.push(FieldError::invalid(path, text, why));
        }
    }
}

/// Checks that a port's number is one.
pub(crate) fn port_number(number: i64, path: impl fmt::Display, errors: &mut Vec<FieldError>) {
    if !(1..=65535).contains(&number) {
        errors.push(FieldError::invalid(path, number, "must be between 1 and 65535, inclusive"));
    }
}

/// What is wrong with the name of a port (an IANA service name, RFC 6335).
pub(crate) fn port_name(name: &str) -> Vec<&'static str> {
    let mut out = Vec::new();
    if name.len() > 15 {
        out.push("must be no more than 15 characters");
    }
    if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
        out.push("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)");
    }
    if !name.bytes().any(|b| b.is_ascii_lowercase()) {
        out.push("must contain at least one letter (a-z)");
    }
    if name.contains("--") {
        out.push("must not contain consecutive hyphens");
    }
    if name.starts_with('-') || name.ends_with('-') {
        out.push("must not begin or end with a hyphen");
    }
    out
}

/// Checks a port that is a number or a name.
pub(crate) fn port_number_or_name(
    port: &Value,
    path: impl fmt::Display,
    errors: &mut Vec<FieldError>,
) {
    match port {
        Value::Number(number) => port_number(number.as_i64().unwrap_or(0), path, errors),
        Value::String(name) => {
            for why in port_name(name) {
                errors.push(FieldError::invalid(&path, name.as_str(), why));
            }
        }
        _ => errors.push(FieldError::required(path, "")),
    }
}

/// Checks that a value is one of those that there are.
pub(crate) fn check_supported(
    path: impl fmt::Display,
    text: &str,
    supported: &[&str],
    errors: &mut Vec<FieldError>,
) {
    if text.is_empty() && !supported.contains(&"") {
        errors.push(FieldError::required(path, ""));
    } else if !supported.contains(&text) {
        errors.push(FieldError::not_supported(path, text, supported));
    }
}

/// Checks that a field is as it was.
pub(crate) fn immutable(
    new: &Value,
    old: &Value,
    path: &[&str],
    why: &str,
    errors: &mut Vec<FieldError>,
) {
    let (after, before) = (value::at(new, path), value::at(old, path));
    if !value::same(after, before) {
        let shown = after.cloned().unwrap_or_default();
        errors.push(FieldError::invalid(path.join("."), shown, why));
    }
}

/// Checks an address.
pub(crate) fn ip_address(text: &str, path: impl fmt::Display, errors: &mut Vec<FieldError>) {
    if text.parse::<IpAddr>().is_err() {
        let detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
        errors.push(FieldError::invalid(path, text, detail));
    }
}

/// Checks a label selector.
pub(crate) fn label_selector(selector: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    labels(selector.get("matchLabels"), &path.field("matchLabels"), errors);
    let expressions = path.field("matchExpressions");
    for (index, expression) in value::list(selector, &["matchExpressions"]).iter().enumerate() {
        let at = expressions.index(index);
        for why in qualified_name(value::text(expression, &["key"])) {
            errors.push(FieldError::invalid(
                at.field("key"),
                value::text(expression, &["key"]),
                why,
            ));
        }
        let values = value::list(expression, &["values"]);
        match value::text(expression, &["operator"]) {
            "In" | "NotIn" if values.is_empty() => errors.push(FieldError::required(
                at.field("values"),
                "must be specified when `operator` is 'In' or 'NotIn'",
            )),
            "In" | "NotIn" => {}
            "Exists" | "DoesNotExist" if !values.is_empty() => errors.push(FieldError::forbidden(
                at.field("values"),
                "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
            )),
            "Exists" | "DoesNotExist" => {}
            other => errors.push(FieldError::invalid(
                at.field("operator"),
                other,
                "not a valid selector operator",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_as_dns_does() {
        for good in ["a", "a-b", "0", "a1"] {
            assert_eq!(dns_label(good), None, "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b"] {
            assert!(dns_label(bad).is_some(), "{bad}");
        }
        assert!(dns_label(&"a".repeat(64)).is_some());
        assert_eq!(dns_subdomain("a.b-c.d"), None);
        assert!(dns_subdomain("a..b").is_some());
        assert!(dns_1035_label("1a").is_some());
    }

    #[test]
    fn keys_and_values_of_labels_are_checked() {
        for good in ["app", "example.com/app", "a_b.c"] {
            assert!(qualified_name(good).is_empty(), "{good}");
        }
        for bad in ["", "/a", "a/b/c", "a/", "-a", "Example.com/a"] {
            assert!(!qualified_name(bad).is_empty(), "{bad}");
        }
        assert!(label_value("").is_empty());
        assert!(!label_value("a b").is_empty());
    }

    #[test]
    fn ports_have_names_of_services() {
        assert!(port_name("http-1").is_empty());
        for bad in ["", "12", "-a", "a--b", "HTTP", "abcdefghijklmnop"] {
            assert!(!port_name(bad).is_empty(), "{bad}");
        }
    }
}
