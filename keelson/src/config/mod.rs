//! Config files: the documented `KubeletConfiguration` and `KubeProxyConfiguration`.
//!
//! Three things can be with a field. It is supported: it takes effect. It is documented but not
//! supported here: a warning names it. It is wrong (unknown, or of another type): an error names it
//! with its line, beside everything else that is wrong, and nothing starts. kube-proxy goes on with
//! a warning where a field is unknown or stands twice, and so does this ([`Unknown::Warned`]): old
//! files keep fields that are long gone.

pub(crate) mod duration;
mod kubelet;
mod origin;
mod proxy;
mod proxy_flags;
mod proxy_logging;
pub(crate) mod watch;

use std::{borrow::Cow, net::IpAddr, path::Path};

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::Taint;
use keelson_api::quantity::Quantity;
use serde_json::{Map, Value};

pub(crate) use kubelet::KubeletSettings;
pub(crate) use origin::Wrong;
pub(crate) use proxy::{Conntrack, PacketFilter, ProxySettings};
pub(crate) use proxy_flags::ProxyFlags;
pub(crate) use proxy_logging::{LogFormat, ProxyLogging};

use crate::bounded;

/// The largest config file that is read.
const MAX_BYTES: usize = 1 << 20;

/// What kind of value a documented field holds, and whether it does something here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    /// It takes effect; the value must be of this type.
    Supported(Type),
    /// It is documented, but does nothing here; the user is told.
    Unsupported,
    /// It is documented, but there is nothing for it to do here, and this is why.
    NoEffect(&'static str),
    /// An object whose fields are in this table.
    Object(&'static [(&'static str, Field)]),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Bool,
    Integer,
    Text,
    Duration,
    Texts,
    BoolMap,
    /// From the first to the last.
    Within(i64, i64),
    /// In milliseconds, from the first to the last; zero for the default.
    DurationWithin(u64, u64),
    Port,
    Address,
    Addresses,
    /// Addresses with the length of their prefix.
    Range,
    Amount,
    Amounts,
    OneOf(&'static [&'static str]),
    Cgroup,
    Taints,
}

impl Type {
    fn name(self) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Self::Bool => "true or false",
            Self::Integer => "a whole number",
            Self::Text => "text",
            Self::Duration => "a duration such as 10s or 1m30s",
            Self::Texts => "a list of texts",
            Self::BoolMap => "a map of names to true or false",
            Self::Within(least, i64::MAX) => {
                return Cow::Owned(format!("a whole number of at least {least}"));
            }
            Self::Within(least, most) => {
                return Cow::Owned(format!("a whole number from {least} to {most}"));
            }
            Self::DurationWithin(least, most) => {
                let shown = |millis: u64| match millis % 1000 {
                    0 => format!("{}s", millis / 1000),
                    _ => format!("{millis}ms"),
                };
                return Cow::Owned(if most == u64::MAX {
                    format!("a duration of at least {}", shown(least))
                } else {
                    format!("a duration from {} to {}", shown(least), shown(most))
                });
            }
            Self::Port => "a port from 0 to 65535",
            Self::Address => "an IP address",
            Self::Addresses => "a list of IP addresses",
            Self::Range => "a range of addresses such as 10.1.0.0/16",
            Self::Amount => "a quantity such as 10Mi",
            Self::Amounts => "a map of quantities such as {cpu: 100m, memory: 1Gi}",
            Self::OneOf(words) => return Cow::Owned(words.join(" or ")),
            Self::Cgroup => "the path of a cgroup, without .. in it",
            Self::Taints => "a list of taints with key, value and effect",
        })
    }

    fn fits(self, value: &Value) -> bool {
        // an empty text is Go's way of saying nothing
        let text = |fits: fn(&str) -> bool| {
            value.as_str().is_some_and(|text| text.is_empty() || fits(text))
        };
        match self {
            Self::Bool => value.is_boolean(),
            Self::Integer => value.is_i64(),
            Self::Text => value.is_string(),
            Self::Duration => value.as_str().is_some_and(|text| duration::parse(text).is_ok()),
            Self::Texts => value.as_array().is_some_and(|all| all.iter().all(Value::is_string)),
            Self::BoolMap => {
                value.as_object().is_some_and(|all| all.values().all(Value::is_boolean))
            }
            Self::Within(least, most) => {
                value.as_i64().is_some_and(|number| (least..=most).contains(&number))
            }
            Self::DurationWithin(least, most) => {
                value.as_str().and_then(|text| duration::parse(text).ok()).is_some_and(|given| {
                    let within = u128::from(least)..=u128::from(most);
                    given.is_zero() || within.contains(&given.as_millis())
                })
            }
            Self::Port => value.as_u64().is_some_and(|port| port <= u64::from(u16::MAX)),
            Self::Address => text(|text| text.parse::<IpAddr>().is_ok()),
            Self::Addresses => value.as_array().is_some_and(|all| {
                all.iter().all(|one| one.as_str().is_some_and(|one| one.parse::<IpAddr>().is_ok()))
            }),
            Self::Range => text(|text| text.parse::<ipnet::IpNet>().is_ok()),
            Self::Amount => text(is_amount),
            Self::Amounts => value
                .as_object()
                .is_some_and(|all| all.values().all(|one| one.as_str().is_some_and(is_amount))),
            Self::OneOf(words) => {
                value.as_str().is_some_and(|text| text.is_empty() || words.contains(&text))
            }
            Self::Cgroup => text(|path| {
                path.bytes().all(|byte| byte.is_ascii_graphic())
                    && path.split('/').all(|part| part != ".." && part != ".")
            }),
            Self::Taints => {
                serde_json::from_value::<Vec<Taint>>(value.clone()).is_ok_and(|taints| {
                    let effects = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
                    taints.iter().all(|taint| {
                        !taint.key.is_empty() && effects.contains(&taint.effect.as_str())
                    })
                })
            }
        }
    }
}

fn is_amount(text: &str) -> bool {
    Quantity::parse(text).is_ok_and(|amount| amount >= Quantity::ZERO)
}

/// What becomes of fields that are not documented, or stand twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unknown {
    /// They are an error.
    Refused,
    /// They have no effect (the last one of two has), and are named in a warning.
    Warned,
}

/// A config file as read: its fields, and what of them has no effect.
#[derive(Debug)]
struct Checked {
    text: String,
    fields: Value,
    unsupported: Vec<String>,
}

/// Reads a config file of the given kind and holds it against the table of its fields.
fn read(
    path: &Path,
    kind: &str,
    group: &str,
    table: &[(&str, Field)],
    unknown: Unknown,
) -> anyhow::Result<Checked> {
    let context = || format!("config file {}", path.display());
    let text = bounded::read(path, MAX_BYTES).with_context(context)?;
    check(&text, kind, group, table, unknown).with_context(context)
}

fn check(
    text: &[u8],
    kind: &str,
    group: &str,
    table: &[(&str, Field)],
    unknown: Unknown,
) -> anyhow::Result<Checked> {
    let limits = keelson_api::yaml::Limits::default();
    let (document, repeated) = match unknown {
        Unknown::Refused => (keelson_api::yaml::document(text, limits)?, None),
        Unknown::Warned => keelson_api::yaml::lenient_document(text, limits)?,
    };
    let text = String::from_utf8_lossy(text);
    let Value::Object(mut fields) = document else {
        bail!("line 1: a {kind} is a map of fields");
    };
    let found_kind = fields.remove("kind");
    if found_kind.as_ref().and_then(Value::as_str) != Some(kind) {
        bail!(
            "line {}: kind {kind} is wanted, not {}",
            line_of(&text, &["kind"]),
            found_kind.unwrap_or(Value::Null)
        );
    }
    let version = fields.remove("apiVersion");
    if version.as_ref().and_then(Value::as_str) != Some(group) {
        bail!(
            "line {}: apiVersion {group} is wanted, not {}",
            line_of(&text, &["apiVersion"]),
            version.unwrap_or(Value::Null)
        );
    }
    let repeated = repeated.map(|error| format!("{error}; the last one counts"));
    let mut check = Check {
        text: &text,
        unknown,
        path: Vec::new(),
        wrong: Vec::new(),
        unsupported: repeated.into_iter().collect(),
    };
    check.fields(&fields, table);
    let (mut wrong, unsupported) = (check.wrong, check.unsupported);
    if !wrong.is_empty() {
        wrong.sort_unstable();
        let told = wrong.into_iter().map(|(line, message)| format!("line {line}: {message}"));
        bail!("{}", told.collect::<Vec<_>>().join("; "));
    }
    Ok(Checked { text: text.into_owned(), fields: Value::Object(fields), unsupported })
}

/// What is on the way through a file's fields.
struct Check<'a> {
    text: &'a str,
    unknown: Unknown,
    path: Vec<&'a str>,
    /// Lines, and what is wrong on them.
    wrong: Vec<(usize, String)>,
    unsupported: Vec<String>,
}

impl<'a> Check<'a> {
    fn fields(&mut self, fields: &'a Map<String, Value>, table: &[(&str, Field)]) {
        for (name, value) in fields {
            self.path.push(name);
            let known = table.iter().find(|(known, _)| known == name);
            self.field(known.map(|(_, field)| *field), value);
            self.path.pop();
        }
    }

    fn field(&mut self, known: Option<Field>, value: &'a Value) {
        let (line, path) = (line_of(self.text, &self.path), self.path.join("."));
        match known {
            None if self.unknown == Unknown::Refused => {
                self.wrong.push((line, format!("unknown field {path:?}")));
            }
            None => self.unsupported.push(format!("line {line}: unknown field {path:?}")),
            _ if value.is_null() => {}
            Some(Field::Supported(kind)) if !kind.fits(value) => {
                let message = format!("{path}: {} is wanted, not {value}", kind.name());
                self.wrong.push((line, message));
            }
            Some(Field::Supported(_)) => {}
            Some(Field::Unsupported) => {
                self.unsupported.push(format!("line {line}: {path} has no effect here yet"));
            }
            Some(Field::NoEffect(_)) if self.unknown == Unknown::Warned && says_nothing(value) => {}
            Some(Field::NoEffect(why)) => {
                self.unsupported.push(format!("line {line}: {path} has no effect: {why}"));
            }
            Some(Field::Object(table)) => match value {
                Value::Object(fields) => self.fields(fields, table),
                _ => {
                    self.wrong.push((line, format!("{path}: an object is wanted, not {value}")));
                }
            },
        }
    }
}

/// Whether a value is Go's way of saying nothing: a file that a program wrote has all fields.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => matches!(text.as_str(), "" | "0" | "0s"),
        Value::Array(all) => all.is_empty(),
        Value::Object(fields) => fields.values().all(says_nothing),
    }
}

/// The line that a field stands on: the last of a run of lines that begin with the path's keys in
/// their order, each within the one before. Counted from 1; 1 if it can't be found (flow style).
fn line_of(text: &str, path: &[&str]) -> usize {
    let mut wanted = path.iter();
    let mut next = wanted.next();
    let mut found = 1;
    let mut around = None;
    for (index, line) in text.lines().enumerate() {
        let Some(key) = next else { break };
        let begin = line.trim_start();
        let indent = line.len() - begin.len();
        if begin.is_empty() || begin.starts_with('#') {
            continue;
        }
        if around.is_some_and(|around| indent <= around) {
            // What follows is another field's; this one is on the line of what it is in.
            break;
        }
        let begin = begin.trim_start_matches(['"', '\'', '{', ' ']);
        let rest = begin.strip_prefix(key).map(|rest| rest.trim_start_matches(['"', '\'']));
        if rest.is_some_and(|rest| rest.trim_start().starts_with(':')) {
            found = index + 1;
            around = Some(indent);
            next = wanted.next();
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[(&str, Field)] = &[
        ("port", Field::Supported(Type::Integer)),
        ("wait", Field::Supported(Type::Duration)),
        ("later", Field::Unsupported),
        ("inner", Field::Object(&[("name", Field::Supported(Type::Text))])),
    ];

    fn checked(body: &str) -> anyhow::Result<Checked> {
        let text = format!("kind: K\napiVersion: g/v1\n{body}");
        check(text.as_bytes(), "K", "g/v1", TABLE, Unknown::Refused)
    }

    #[test]
    fn supported_fields_pass_and_unsupported_ones_are_named() {
        let config = checked("port: 1\nwait: 1m\nlater: true\ninner: {name: x}\n").unwrap();
        assert_eq!(config.unsupported, ["line 5: later has no effect here yet"]);
        assert_eq!(config.fields["port"], 1);
    }

    #[test]
    fn wrong_fields_are_named_with_their_line() {
        for (body, message) in [
            ("port: x\n", "line 3: port: a whole number is wanted, not \"x\""),
            (
                "port: 1\nwait: 10\n",
                "line 4: wait: a duration such as 10s or 1m30s is wanted, not 10",
            ),
            ("prot: 1\n", "line 3: unknown field \"prot\""),
            ("inner:\n  nam: x\n", "line 4: unknown field \"inner.nam\""),
            ("inner: 3\n", "line 3: inner: an object is wanted, not 3"),
            (
                "wait: 1\ninner: {name: 1}\nlater: {\n  name: 2}\nport: x\n",
                "line 3: wait: a duration such as 10s or 1m30s is wanted, not 1; \
                 line 4: inner.name: text is wanted, not 1; \
                 line 7: port: a whole number is wanted, not \"x\"",
            ),
        ] {
            assert_eq!(checked(body).unwrap_err().to_string(), message);
        }
        let error =
            check(b"kind: Other\n", "K", "g/v1", TABLE, Unknown::Refused).unwrap_err().to_string();
        assert_eq!(error, "line 1: kind K is wanted, not \"Other\"");
    }

    #[test]
    fn where_kube_proxy_goes_on_with_a_warning_so_does_this() {
        let text = b"kind: K\napiVersion: g/v1\nprot: 1\nport: 1\ninner:\n  nam: x\nport: 2\n";
        let config = check(text, "K", "g/v1", TABLE, Unknown::Warned).unwrap();
        assert_eq!(config.fields["port"], 2);
        assert_eq!(
            config.unsupported,
            [
                "line 7: key \"port\" stands here for a second time; the last one counts",
                "line 6: unknown field \"inner.nam\"",
                "line 3: unknown field \"prot\"",
            ]
        );
        let wrong = b"kind: K\napiVersion: g/v1\nport: x\n";
        assert!(check(wrong, "K", "g/v1", TABLE, Unknown::Warned).is_err());
    }
}
