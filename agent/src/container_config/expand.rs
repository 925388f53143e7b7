//! `$(VAR)` in commands, arguments and sub-paths.

use std::collections::BTreeMap;

/// Replaces `$(NAME)` by the variable's value. As documented, an unknown name stays as it is, and
/// `$$` stands for `$`, so that `$$(NAME)` is never replaced.
pub(crate) fn expand(text: &str, variables: &BTreeMap<&str, &str>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(dollar) = rest.find('$') {
        out.push_str(&rest[..dollar]);
        let after = &rest[dollar + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some((name, tail)) =
            after.strip_prefix('(').and_then(|inner| inner.split_once(')'))
        {
            match variables.get(name) {
                Some(value) => out.push_str(value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = tail;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn variables_are_expanded_as_documented() {
        let variables = BTreeMap::from([("A", "1"), ("B", "$(A)"), ("E", "")]);
        let rows = [
            ("$(A)", "1"),
            ("x$(A)y$(E)z", "x1yz"),
            ("$(B)", "$(A)"),
            ("$(NO)", "$(NO)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$A ${A} $", "$A ${A} $"),
            ("$(A", "$(A"),
        ];
        for (text, expected) in rows {
            assert_eq!(expand(text, &variables), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn text_without_dollars_is_left_alone(text in "[^$]*") {
            prop_assert_eq!(expand(&text, &BTreeMap::new()), text);
        }

        #[test]
        fn any_text_is_taken(text in ".*") {
            expand(&text, &BTreeMap::from([("A", "1")]));
        }
    }
}
