//! Label selectors as text.

use serde_json::Value;

use crate::registry::value;

/// A label selector of the API as text (`a=b,c in (d,e)`); empty if it selects everything.
pub(crate) fn selector_text(selector: &Value) -> String {
    let mut parts: Vec<String> = value::entries(selector, &["matchLabels"])
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    for expression in value::list(selector, &["matchExpressions"]) {
        let key = value::text(expression, &["key"]);
        let mut values: Vec<&str> =
            value::list(expression, &["values"]).iter().filter_map(Value::as_str).collect();
        values.sort_unstable();
        let values = values.join(",");
        parts.push(match value::text(expression, &["operator"]) {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "DoesNotExist" => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    parts.sort_unstable();
    parts.join(",")
}

/// A map of labels as text (`a=b,c=d`); `<none>` if it is empty.
pub(crate) fn labels_text(labels: Option<&Value>) -> String {
    let mut parts: Vec<String> = labels
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    if parts.is_empty() {
        return "<none>".to_owned();
    }
    parts.sort_unstable();
    parts.join(",")
}
