//! Roles, bindings and priority classes.

use jiff::Timestamp;
use serde_json::Value;

use super::{AGE, Column, Columns, GENERIC, NAME, age, count, name, number, text, wide};
use crate::registry::value;

pub(crate) static ROLE: Columns = Columns { columns: GENERIC.columns, cells: GENERIC.cells };

pub(crate) static ROLE_BINDING: Columns = Columns {
    columns: &[NAME, text("Role"), AGE, wide("Users"), wide("Groups"), wide("ServiceAccounts")],
    cells: binding,
};

fn binding(object: &Value, now: Timestamp) -> Vec<Value> {
    let role = |field: &str| value::text(object, &["roleRef", field]);
    let subjects = |kind: &str| -> Value {
        let names: Vec<String> = value::list(object, &["subjects"])
            .iter()
            .filter(|subject| value::text(subject, &["kind"]) == kind)
            .map(|subject| {
                let name = value::text(subject, &["name"]);
                match value::text(subject, &["namespace"]) {
                    "" => name.to_owned(),
                    namespace => format!("{namespace}/{name}"),
                }
            })
            .collect();
        names.join(", ").into()
    };
    vec![
        name(object),
        format!("{}/{}", role("kind"), role("name")).into(),
        age(object, now),
        subjects("User"),
        subjects("Group"),
        subjects("ServiceAccount"),
    ]
}

pub(crate) static PRIORITY_CLASS: Columns = Columns {
    columns: &[
        NAME,
        number("Value"),
        Column { name: "Global-Default", kind: "boolean", format: "", priority: 0 },
        AGE,
        text("PreemptionPolicy"),
    ],
    cells: |object, now| {
        vec![
            name(object),
            count(object, &["value"]),
            value::flag(object, &["globalDefault"]).into(),
            age(object, now),
            value::text(object, &["preemptionPolicy"]).into(),
        ]
    },
};
