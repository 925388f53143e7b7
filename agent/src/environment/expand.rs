//! `$(VAR)` in values, commands and arguments.
//!
//! The rules are those of the API reference: `$(NAME)` becomes the variable's value, a reference to
//! what is not defined stays as it is written, and `$$` is one dollar sign, so that `$$(NAME)`
//! comes out as the text `$(NAME)`.

/// Expands `$(NAME)` by `lookup`.
pub fn expand(text: &str, mut lookup: impl FnMut(&str) -> Option<String>) -> String {
    let mut expanded = String::with_capacity(text.len());
    walk(text, |piece| match piece {
        Piece::Text(text) => expanded.push_str(text),
        Piece::Reference { name, written } => match lookup(name) {
            Some(value) => expanded.push_str(&value),
            None => expanded.push_str(written),
        },
    });
    expanded
}

/// Expands a container's `command` or `args` by its environment, as the kubelet does before it
/// hands them to the runtime.
pub fn expand_all(words: &[String], environment: &[(String, String)]) -> Vec<String> {
    words.iter().map(|word| expand(word, |name| value_of(environment, name))).collect()
}

/// Expands a `subPathExpr`. Unlike elsewhere, each reference must be to a defined variable.
///
/// # Errors
/// The name of the variable that is missing.
pub fn expand_sub_path(
    expression: &str,
    environment: &[(String, String)],
) -> Result<String, String> {
    let mut missing = None;
    let path = expand(expression, |name| {
        let value = value_of(environment, name);
        if value.is_none() {
            missing.get_or_insert_with(|| format!("missing value for {name:?}"));
        }
        value
    });
    missing.map_or(Ok(path), Err)
}

fn value_of(environment: &[(String, String)], name: &str) -> Option<String> {
    environment.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.clone())
}

enum Piece<'a> {
    Text(&'a str),
    Reference { name: &'a str, written: &'a str },
}

fn walk<'a>(mut rest: &'a str, mut each: impl FnMut(Piece<'a>)) {
    while let Some(at) = rest.find('$') {
        each(Piece::Text(&rest[..at]));
        let from = &rest[at..];
        let bytes = from.as_bytes();
        rest = match bytes.get(1) {
            Some(b'$') => {
                each(Piece::Text("$"));
                &from[2..]
            }
            Some(b'(') => match from.find(')') {
                Some(end) => {
                    each(Piece::Reference { name: &from[2..end], written: &from[..=end] });
                    &from[end + 1..]
                }
                // An opening without an end is only text.
                None => {
                    each(Piece::Text("$("));
                    &from[2..]
                }
            },
            _ => {
                each(Piece::Text("$"));
                &from[1..]
            }
        };
    }
    each(Piece::Text(rest));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_expand_as_documented() {
        let environment =
            [("A", "1"), ("B", "$(A)"), ("EMPTY", "")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        for (text, expanded) in [
            ("", ""),
            ("plain", "plain"),
            ("$(A)", "1"),
            ("x$(A)y$(A)z", "x1y1z"),
            ("$(B)", "$(A)"),
            ("$(EMPTY)", ""),
            ("$(MISSING)", "$(MISSING)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$$$$(A)", "$$(A)"),
            ("$$", "$"),
            ("$", "$"),
            ("$A", "$A"),
            ("$(A", "$(A"),
            ("$(A$(A)", "$(A$(A)"),
            ("$()", "$()"),
            ("ü$(A)ü", "ü1ü"),
        ] {
            assert_eq!(expand(text, |name| value_of(&environment, name)), expanded, "{text:?}");
        }
        let words = ["sh".to_owned(), "$(A)".to_owned()];
        assert_eq!(expand_all(&words, &environment), ["sh", "1"]);
        assert_eq!(expand_sub_path("a/$(A)", &environment).as_deref(), Ok("a/1"));
        assert_eq!(expand_sub_path("$(X)", &environment).unwrap_err(), "missing value for \"X\"");
    }

    proptest::proptest! {
        #[test]
        fn text_without_dollars_stays(text in "[^$]{0,40}") {
            proptest::prop_assert_eq!(expand(&text, |_| None), text);
        }

        #[test]
        fn any_text_expands(text in "[$()aé]{0,40}") {
            let _ = expand(&text, |_| Some("x".to_owned()));
        }
    }
}
