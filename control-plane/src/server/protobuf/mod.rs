//! Bodies in Kubernetes' protobuf form, read into the JSON that all else works on.
//!
//! Typed clients, kubectl's `create deployment` and `auth can-i` among them, send what they create
//! so and have no second try in another form; so bodies are read, while answers are JSON, which
//! those clients accept too.
//!
//! `fields.txt` has the numbers, names and types of the fields of all messages that can be part of
//! a body: facts of the
//! `generated.proto` files of k8s.io/api and k8s.io/apimachinery, read off the tags in the crate
//! k8s-pb 0.9 (Apache-2.0).
//!
//! ```text
//! @apps/v1 Deployment apps.v1.Deployment      the message of a kind
//! apps.v1.Deployment 1:metadata:meta.v1.ObjectMeta 2:spec:apps.v1.DeploymentSpec …
//!                    number:JSON name:type    *type repeats, {type is a map with string keys,
//!                                             int? and bool? say something with zero and false,
//!                                             the name - is a message whose fields are the parent's
//! ```

#[cfg(test)]
mod tests;
mod wire;

use std::{collections::HashMap, sync::LazyLock};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use self::wire::{Field, Reader, Wire};

/// The media type.
pub(crate) const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";
/// What a body begins with.
const MAGIC: &[u8] = b"k8s\0";
/// Messages in messages.
const DEPTH: usize = 64;
/// Values in all, so that a body can't become much larger in memory than it was.
const VALUES: usize = 200_000;

/// Why a body can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProtobufError {
    #[error(
        "it does not begin with the four bytes that every Kubernetes protobuf body begins with"
    )]
    NoMagic,
    #[error("it is cut short or not protobuf")]
    Malformed,
    #[error("the field {0} has another type than it should")]
    WrongType(String),
    #[error("it is nested too deep or has too many values")]
    TooLarge,
    #[error("{0} is not known here in this form: send it as JSON")]
    UnknownKind(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    One,
    Repeated,
    Map,
}

#[derive(Clone, Copy, Debug)]
struct FieldType {
    number: u64,
    name: &'static str,
    shape: Shape,
    kind: &'static str,
}

struct Table {
    /// Version, kind, message.
    kinds: Vec<(&'static str, &'static str, &'static str)>,
    messages: HashMap<&'static str, Vec<FieldType>>,
}

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let mut table = Table { kinds: Vec::new(), messages: HashMap::new() };
    for line in include_str!("fields.txt").lines() {
        let mut words = line.split(' ').filter(|word| !word.is_empty());
        let Some(first) = words.next() else { continue };
        if let Some(api_version) = first.strip_prefix('@') {
            if let (Some(kind), Some(message)) = (words.next(), words.next()) {
                table.kinds.push((api_version, kind, message));
            }
            continue;
        }
        let fields = words.filter_map(|word| {
            let mut parts = word.split(':');
            let (number, name, kind) = (parts.next()?, parts.next()?, parts.next()?);
            let (shape, kind) = match (kind.strip_prefix('*'), kind.strip_prefix('{')) {
                (Some(kind), _) => (Shape::Repeated, kind),
                (_, Some(kind)) => (Shape::Map, kind),
                _ => (Shape::One, kind),
            };
            Some(FieldType { number: number.parse().ok()?, name, shape, kind })
        });
        table.messages.insert(first, fields.collect());
    }
    table
});

/// Reads a body into the object that it is, with `apiVersion` and `kind`.
pub(crate) fn decode(body: &[u8]) -> Result<Value, ProtobufError> {
    let body = body.strip_prefix(MAGIC).ok_or(ProtobufError::NoMagic)?;
    // runtime.Unknown: 1 is the type, 2 the object.
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    for field in Reader::new(body) {
        match field? {
            Field { number: 1, value: Wire::Bytes(type_meta) } => {
                for field in Reader::new(type_meta) {
                    match field? {
                        Field { number: 1, value: Wire::Bytes(text) } => api_version = utf8(text)?,
                        Field { number: 2, value: Wire::Bytes(text) } => kind = utf8(text)?,
                        _ => {}
                    }
                }
            }
            Field { number: 2, value: Wire::Bytes(bytes) } => raw = bytes,
            _ => {}
        }
    }
    // Each group has the options in its own version.
    let version = if kind == "DeleteOptions" { "v1" } else { api_version.as_str() };
    let message = TABLE
        .kinds
        .iter()
        .find(|known| known.0 == version && known.1 == kind)
        .map(|known| known.2)
        .ok_or_else(|| ProtobufError::UnknownKind(format!("{kind} of {api_version}")))?;
    let mut object = Map::new();
    object.insert("apiVersion".to_owned(), api_version.into());
    object.insert("kind".to_owned(), kind.into());
    let mut decoder = Decoder { values: 0 };
    decoder.message(message, raw, &mut object, DEPTH)?;
    Ok(Value::Object(object))
}

fn utf8(bytes: &[u8]) -> Result<String, ProtobufError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| ProtobufError::Malformed)
}

struct Decoder {
    values: usize,
}

impl Decoder {
    fn message(
        &mut self,
        message: &str,
        bytes: &[u8],
        object: &mut Map<String, Value>,
        depth: usize,
    ) -> Result<(), ProtobufError> {
        let depth = depth.checked_sub(1).ok_or(ProtobufError::TooLarge)?;
        let fields = TABLE
            .messages
            .get(message)
            .ok_or_else(|| ProtobufError::UnknownKind(message.to_owned()))?;
        for field in Reader::new(bytes) {
            let field = field?;
            self.values += 1;
            if self.values > VALUES {
                return Err(ProtobufError::TooLarge);
            }
            // What is not known is newer than this, and left out, as Kubernetes does.
            let Some(known) = fields.iter().find(|f| f.number == field.number) else { continue };
            self.field(known, field.value, object, depth)?;
        }
        Ok(())
    }

    fn field(
        &mut self,
        field: &FieldType,
        value: Wire<'_>,
        object: &mut Map<String, Value>,
        depth: usize,
    ) -> Result<(), ProtobufError> {
        if field.name == "-" {
            return self.message(field.kind, value.bytes(field.kind)?, object, depth);
        }
        match field.shape {
            Shape::One => {
                if let Some(value) = self.value(field, value, depth)? {
                    object.insert(field.name.to_owned(), value);
                }
            }
            Shape::Repeated => {
                let list = object.entry(field.name).or_insert_with(|| json!([]));
                let Some(list) = list.as_array_mut() else { return Ok(()) };
                match value {
                    // Numbers may come packed.
                    Wire::Bytes(mut packed) if field.kind == "int" => {
                        while !packed.is_empty() {
                            let number = wire::varint(&mut packed)?;
                            self.values += 1;
                            list.push(number.cast_signed().into());
                        }
                        if self.values > VALUES {
                            return Err(ProtobufError::TooLarge);
                        }
                    }
                    // An item counts also where it is empty.
                    value => {
                        let item = self.value(field, value, depth)?;
                        list.push(item.unwrap_or_else(|| empty(field.kind)));
                    }
                }
            }
            Shape::Map => {
                let map = object.entry(field.name).or_insert_with(|| json!({}));
                let (mut key, mut item) = (String::new(), None);
                for entry in Reader::new(value.bytes(field.name)?) {
                    match entry? {
                        Field { number: 1, value: Wire::Bytes(text) } => key = utf8(text)?,
                        Field { number: 2, value } => item = self.value(field, value, depth)?,
                        _ => {}
                    }
                }
                if let Some(map) = map.as_object_mut() {
                    map.insert(key, item.unwrap_or_else(|| empty(field.kind)));
                }
            }
        }
        Ok(())
    }

    /// `None` for what is left out in JSON: senders write empty fields too.
    fn value(
        &mut self,
        field: &FieldType,
        value: Wire<'_>,
        depth: usize,
    ) -> Result<Option<Value>, ProtobufError> {
        let name = field.name;
        Ok(match field.kind {
            "string" => {
                let text = utf8(value.bytes(name)?)?;
                (!text.is_empty()).then(|| text.into())
            }
            "bytes" => Some(STANDARD.encode(value.bytes(name)?).into()),
            "int" => Some(value.number(name)?.cast_signed()).filter(|n| *n != 0).map(Value::from),
            "int?" => Some(value.number(name)?.cast_signed().into()),
            "bool" => Some(value.number(name)? != 0).filter(|set| *set).map(Value::from),
            "bool?" => Some((value.number(name)? != 0).into()),
            "double" => Some(f64::from_bits(value.fixed(name)?).into()),
            "time" => time(value.bytes(name)?)?,
            "quantity" => Some(strings(value.bytes(name)?)?.pop().unwrap_or_else(|| "0".into())),
            "intstr" => Some(int_or_string(value.bytes(name)?)?),
            "strings" => Some(strings(value.bytes(name)?)?.into()),
            "raw" => raw_json(value.bytes(name)?)?,
            message => {
                let mut object = Map::new();
                self.message(message, value.bytes(name)?, &mut object, depth)?;
                Some(object.into())
            }
        })
    }
}

/// The value that says nothing.
fn empty(kind: &str) -> Value {
    match kind {
        "string" | "bytes" => "".into(),
        "int" => 0.into(),
        "bool" => false.into(),
        _ => json!({}),
    }
}

/// Seconds and nanoseconds since 1970; without either it is no time.
fn time(bytes: &[u8]) -> Result<Option<Value>, ProtobufError> {
    let (mut seconds, mut nanoseconds) = (0, 0);
    for field in Reader::new(bytes) {
        match field? {
            Field { number: 1, value } => seconds = value.number("seconds")?.cast_signed(),
            Field { number: 2, value } => nanoseconds = value.number("nanos")?.cast_signed(),
            _ => {}
        }
    }
    if (seconds, nanoseconds) == (0, 0) {
        return Ok(None);
    }
    let nanoseconds = i32::try_from(nanoseconds).map_err(|_| ProtobufError::Malformed)?;
    let time = Timestamp::new(seconds, nanoseconds).map_err(|_| ProtobufError::Malformed)?;
    let format = if nanoseconds == 0 { "%Y-%m-%dT%H:%M:%SZ" } else { "%Y-%m-%dT%H:%M:%S%.6fZ" };
    Ok(Some(time.strftime(format).to_string().into()))
}

/// All strings numbered 1.
fn strings(bytes: &[u8]) -> Result<Vec<Value>, ProtobufError> {
    let mut strings = Vec::new();
    for field in Reader::new(bytes) {
        if let Field { number: 1, value } = field? {
            strings.push(utf8(value.bytes("items")?)?.into());
        }
    }
    Ok(strings)
}

/// 1 says which: 0 is the number 2, 1 the string 3.
fn int_or_string(bytes: &[u8]) -> Result<Value, ProtobufError> {
    let (mut is_string, mut number, mut text) = (false, 0, String::new());
    for field in Reader::new(bytes) {
        match field? {
            Field { number: 1, value } => is_string = value.number("type")? != 0,
            Field { number: 2, value } => number = value.number("intVal")?.cast_signed(),
            Field { number: 3, value } => text = utf8(value.bytes("strVal")?)?,
            _ => {}
        }
    }
    Ok(if is_string { text.into() } else { number.into() })
}

/// JSON inside.
fn raw_json(bytes: &[u8]) -> Result<Option<Value>, ProtobufError> {
    for field in Reader::new(bytes) {
        if let Field { number: 1, value } = field? {
            let bytes = value.bytes("raw")?;
            return serde_json::from_slice(bytes).map(Some).map_err(|_| ProtobufError::Malformed);
        }
    }
    Ok(None)
}
