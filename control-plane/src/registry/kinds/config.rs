//! ConfigMaps and Secrets.

use std::collections::BTreeSet;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;

use super::rules::immutable;
use crate::{
    registry::{
        Strategy,
        path::Path,
        value::{self, object_at, set_default_text},
    },
    status::FieldError,
};

/// What the values of one object may take together.
const LARGEST: usize = 1 << 20;
const LONGEST_KEY: usize = 253;

/// ConfigMaps.
pub(in crate::registry) static CONFIG_MAP: Strategy = Strategy {
    validate: validate_config_map,
    columns: &crate::table::CONFIG_MAP,
    ..Strategy::PLAIN
};

/// Secrets.
pub(in crate::registry) static SECRET: Strategy = Strategy {
    default: default_secret,
    validate: validate_secret,
    fields: &[("type", |o| value::text(o, &["type"]).to_owned())],
    columns: &crate::table::SECRET,
    ..Strategy::PLAIN
};

fn default_secret(secret: &mut Value) {
    let texts = secret.as_object_mut().and_then(|object| {
        set_default_text(object, "type", "Opaque");
        object.remove("stringData")
    });
    // `stringData` is for writing only.
    if let Some(Value::Object(texts)) = texts
        && let Some(data) = object_at(secret, "data")
    {
        for (key, text) in texts {
            data.insert(key, STANDARD.encode(text.as_str().unwrap_or_default()).into());
        }
    }
}

fn key_problem(key: &str) -> Option<String> {
    if key.len() > LONGEST_KEY {
        return Some(format!("must be no more than {LONGEST_KEY} characters"));
    }
    if key == "." || key == ".." {
        return Some(format!("must not be '{key}'"));
    }
    if key.starts_with("..") {
        return Some("must not start with '..'".to_owned());
    }
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (key.is_empty() || !key.bytes().all(allowed)).then(|| {
        "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. \
         'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')"
            .to_owned()
    })
}

fn keys<'a>(object: &'a Value, field: &str) -> impl Iterator<Item = &'a str> + use<'a> {
    value::entries(object, &[field]).map(|(key, _)| key.as_str())
}

fn check_keys(object: &Value, field: &str, errors: &mut Vec<FieldError>) {
    let root = Path::Root.field(field);
    for key in keys(object, field) {
        if let Some(why) = key_problem(key) {
            errors.push(FieldError::invalid(root.key(key), key, why));
        }
    }
}

fn decoded_size(text: &Value) -> usize {
    let text = text.as_str().unwrap_or_default();
    let padding = text.bytes().rev().take(2).filter(|b| *b == b'=').count();
    (text.len() / 4 * 3).saturating_sub(padding)
}

fn validate_config_map(new: &Value, old: Option<&Value>, _: &str, errors: &mut Vec<FieldError>) {
    check_keys(new, "data", errors);
    check_keys(new, "binaryData", errors);
    let texts: BTreeSet<&str> = keys(new, "data").collect();
    for key in keys(new, "binaryData").filter(|key| texts.contains(key)) {
        let detail = format!("duplicate of key present in data: {key}");
        errors.push(FieldError::invalid(format_args!("data[{key}]"), key, detail));
    }
    let size: usize = value::entries(new, &["data"])
        .map(|(_, text)| text.as_str().unwrap_or_default().len())
        .chain(value::entries(new, &["binaryData"]).map(|(_, bytes)| decoded_size(bytes)))
        .sum();
    if size > LARGEST {
        errors.push(FieldError::too_long("", LARGEST));
    }
    check_immutable(new, old, &["data", "binaryData"], errors);
}

fn check_immutable(
    new: &Value,
    old: Option<&Value>,
    fields: &[&str],
    errors: &mut Vec<FieldError>,
) {
    let Some(old) = old.filter(|old| value::flag(old, &["immutable"])) else { return };
    let why = "field is immutable when `immutable` is set";
    if !value::flag(new, &["immutable"]) {
        errors.push(FieldError::forbidden("immutable", why));
    }
    for field in fields {
        if !value::same(new.get(*field), old.get(*field)) {
            errors.push(FieldError::forbidden(field, why));
        }
    }
}

fn validate_secret(new: &Value, old: Option<&Value>, _: &str, errors: &mut Vec<FieldError>) {
    check_keys(new, "data", errors);
    let size: usize = value::entries(new, &["data"]).map(|(_, bytes)| decoded_size(bytes)).sum();
    if size > LARGEST {
        errors.push(FieldError::too_long("data", LARGEST));
    }
    if let Some(old) = old {
        immutable(new, old, &["type"], super::rules::IMMUTABLE, errors);
    }
    check_immutable(new, old, &["data"], errors);
    let has = |key: &str| new.pointer("/data").is_some_and(|data| data.get(key).is_some());
    let mut require = |key: &str| {
        if !has(key) {
            errors.push(FieldError::required(format_args!("data[{key}]"), ""));
        }
    };
    match value::text(new, &["type"]) {
        "kubernetes.io/service-account-token" => {
            let account = ["metadata", "annotations", "kubernetes.io/service-account.name"];
            if value::text(new, &account).is_empty() {
                let field = "metadata.annotations[kubernetes.io/service-account.name]";
                errors.push(FieldError::required(field, ""));
            }
        }
        "kubernetes.io/dockercfg" => require(".dockercfg"),
        "kubernetes.io/dockerconfigjson" => require(".dockerconfigjson"),
        "kubernetes.io/tls" => {
            require("tls.crt");
            require("tls.key");
        }
        "kubernetes.io/ssh-auth" => require("ssh-privatekey"),
        "kubernetes.io/basic-auth" if !has("username") && !has("password") => {
            errors.push(FieldError::required("data[username]", ""));
            errors.push(FieldError::required("data[password]", ""));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn problems(
        check: fn(&Value, Option<&Value>, &str, &mut Vec<FieldError>),
        new: Value,
        old: Option<Value>,
    ) -> Vec<String> {
        let mut errors = Vec::new();
        check(&new, old.as_ref(), "", &mut errors);
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn keys_and_sizes_are_checked() {
        let bad = problems(validate_config_map, json!({"data": {"a/b": "x"}}), None);
        assert!(
            bad[0].starts_with("data[a/b]: Invalid value: \"a/b\": a valid config key"),
            "{bad:?}"
        );
        let large = json!({"data": {"a": "x".repeat(LARGEST + 1)}});
        assert_eq!(
            problems(validate_config_map, large, None),
            [": Too long: may not be more than 1048576 bytes"]
        );
        // No base64, and no reason to stumble.
        assert_eq!(decoded_size(&json!("=")), 0);
    }

    #[test]
    fn what_is_immutable_stays() {
        let old = json!({"immutable": true, "data": {"a": "1"}});
        let new = json!({"immutable": true, "data": {"a": "2"}});
        assert_eq!(
            problems(validate_config_map, new, Some(old)),
            ["data: Forbidden: field is immutable when `immutable` is set"]
        );
    }

    #[test]
    fn secrets_are_written_as_text_and_kept_as_bytes() {
        let mut secret = json!({"stringData": {"a": "hello"}, "data": {"b": "eA=="}});
        default_secret(&mut secret);
        assert_eq!(secret, json!({"type": "Opaque", "data": {"a": "aGVsbG8=", "b": "eA=="}}));
        let tls = json!({"type": "kubernetes.io/tls", "data": {"tls.crt": ""}});
        assert_eq!(problems(validate_secret, tls, None), ["data[tls.key]: Required value"]);
    }
}
