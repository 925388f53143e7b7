//! What is wrong with a pod's volumes.

use std::collections::BTreeSet;

use keelson_api::quantity::Quantity;
use serde_json::Value;

use crate::{
    registry::{
        kinds::rules::{self, check_supported},
        path::Path,
        value,
    },
    status::FieldError,
};

/// What a hostPath may be asked to be.
const PATH_TYPES: &[&str] = &[
    "",
    "BlockDevice",
    "CharDevice",
    "Directory",
    "DirectoryOrCreate",
    "File",
    "FileOrCreate",
    "Socket",
];

/// Checks the volumes; gives their names.
pub(super) fn validate<'a>(
    spec: &'a Value,
    path: &Path<'_>,
    errors: &mut Vec<FieldError>,
) -> BTreeSet<&'a str> {
    let root = path.field("volumes");
    let mut names = BTreeSet::new();
    for (index, volume) in value::list(spec, &["volumes"]).iter().enumerate() {
        let at = root.index(index);
        let name = value::text(volume, &["name"]);
        if name.is_empty() {
            errors.push(FieldError::required(at.field("name"), ""));
        } else if let Some(why) = rules::dns_label(name) {
            errors.push(FieldError::invalid(at.field("name"), name, why));
        } else if !names.insert(name) {
            errors.push(FieldError::duplicate(at.field("name"), name));
        }
        source(volume, &at, errors);
    }
    names
}

fn source(volume: &Value, at: &Path<'_>, errors: &mut Vec<FieldError>) {
    let mut sources = volume.as_object().into_iter().flatten().filter(|(key, _)| *key != "name");
    let Some((kind, source)) = sources.next() else {
        errors.push(FieldError::required(at, "must specify a volume type"));
        return;
    };
    for (extra, _) in sources {
        let detail = "may not specify more than 1 volume type";
        errors.push(FieldError::forbidden(at.field(extra), detail));
    }
    let path = at.field(kind);
    match kind.as_str() {
        "emptyDir" => {
            let medium = value::text(source, &["medium"]);
            if !matches!(medium, "" | "Memory" | "HugePages") && !medium.starts_with("HugePages-") {
                errors.push(FieldError::not_supported(
                    path.field("medium"),
                    medium,
                    &["", "HugePages", "Memory"],
                ));
            }
            let limit = value::text(source, &["sizeLimit"]);
            if Quantity::parse(limit).is_ok_and(|limit| limit.is_negative()) {
                let detail = "SizeLimit field must be a valid resource quantity";
                errors.push(FieldError::forbidden(path.field("sizeLimit"), detail));
            }
        }
        "hostPath" => {
            let target = value::text(source, &["path"]);
            if target.is_empty() {
                errors.push(FieldError::required(path.field("path"), ""));
            }
            if target.split('/').any(|part| part == "..") {
                let detail = "must not contain '..'";
                errors.push(FieldError::invalid(path.field("path"), target, detail));
            }
            let kind = value::text(source, &["type"]);
            check_supported(path.field("type"), kind, PATH_TYPES, errors);
        }
        "secret" => {
            if value::text(source, &["secretName"]).is_empty() {
                errors.push(FieldError::required(path.field("secretName"), ""));
            }
            items(source, &path, errors);
        }
        "configMap" => {
            if value::text(source, &["name"]).is_empty() {
                errors.push(FieldError::required(path.field("name"), ""));
            }
            items(source, &path, errors);
        }
        "downwardAPI" => downward(source, &path, errors),
        "projected" => projected(source, &path, errors),
        _ => {}
    }
    mode(source, "defaultMode", &path, errors);
}

fn mode(object: &Value, field: &str, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    if let Some(mode) = value::int(object, &[field])
        && !(0..=0o777).contains(&mode)
    {
        let detail = "must be a number between 0 and 0777 (octal), both inclusive";
        errors.push(FieldError::invalid(path.field(field), mode, detail));
    }
}

/// A path inside a volume: relative, and not out of it.
fn inner_path(text: &str, path: Path<'_>, errors: &mut Vec<FieldError>) {
    if text.is_empty() {
        errors.push(FieldError::required(path, ""));
    } else if text.starts_with('/') {
        errors.push(FieldError::invalid(path, text, "must be a relative path"));
    } else if text.split('/').any(|part| part == "..") {
        errors.push(FieldError::invalid(path, text, "must not contain '..'"));
    } else if text.starts_with("..") {
        errors.push(FieldError::invalid(path, text, "must not start with '..'"));
    }
}

fn items(source: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let root = path.field("items");
    for (index, item) in value::list(source, &["items"]).iter().enumerate() {
        let at = root.index(index);
        if value::text(item, &["key"]).is_empty() {
            errors.push(FieldError::required(at.field("key"), ""));
        }
        inner_path(value::text(item, &["path"]), at.field("path"), errors);
        mode(item, "mode", &at, errors);
    }
}

fn downward(source: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let root = path.field("items");
    for (index, item) in value::list(source, &["items"]).iter().enumerate() {
        let at = root.index(index);
        inner_path(value::text(item, &["path"]), at.field("path"), errors);
        let (field, resource) =
            (value::at(item, &["fieldRef"]), value::at(item, &["resourceFieldRef"]));
        match (field, resource) {
            (None, None) => {
                errors.push(FieldError::required(
                    at,
                    "one of fieldRef and resourceFieldRef is required",
                ));
            }
            (Some(_), Some(_)) => errors.push(FieldError::invalid(
                at,
                "resource",
                "fieldRef and resourceFieldRef can not be specified simultaneously",
            )),
            _ => {}
        }
        mode(item, "mode", &at, errors);
    }
}

fn projected(source: &Value, path: &Path<'_>, errors: &mut Vec<FieldError>) {
    let root = path.field("sources");
    for (index, entry) in value::list(source, &["sources"]).iter().enumerate() {
        let at = root.index(index);
        let kinds: Vec<(&String, &Value)> = entry.as_object().into_iter().flatten().collect();
        for (extra, _) in kinds.iter().skip(1) {
            let detail = "may not specify more than 1 volume type per source";
            errors.push(FieldError::forbidden(at.field(extra), detail));
        }
        let Some((kind, projection)) = kinds.first() else {
            continue;
        };
        let path = at.field(kind);
        match kind.as_str() {
            "secret" | "configMap" => {
                if value::text(projection, &["name"]).is_empty() {
                    errors.push(FieldError::required(path.field("name"), ""));
                }
                items(projection, &path, errors);
            }
            "downwardAPI" => downward(projection, &path, errors),
            "serviceAccountToken" => {
                let seconds = value::int(projection, &["expirationSeconds"]).unwrap_or(3600);
                if seconds < 600 {
                    errors.push(FieldError::invalid(
                        path.field("expirationSeconds"),
                        seconds,
                        "may not specify a duration less than 10 minutes",
                    ));
                }
                inner_path(value::text(projection, &["path"]), path.field("path"), errors);
            }
            _ => {}
        }
    }
}
