//! One rule as text, exactly as `iptables-save` prints it, so that both can be compared.
//!
//! Nothing from an object gets in but addresses, numbers and, cleaned, names in comments.

use std::{
    fmt::{self, Write},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use super::chain::protocol_name;
use crate::model::{Family, Protocol};

/// The kernel keeps no longer comment, and a zero at its end.
const COMMENT_MAX: usize = 255;

/// A rule in the making. The order of calls is that of `iptables-save`: source, destination,
/// interface, protocol, matches, and the target at last.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rule {
    text: String,
}

impl Rule {
    /// A rule that matches everything.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Words that need no check.
    pub(crate) fn words(mut self, words: impl fmt::Display) -> Self {
        if !self.text.is_empty() {
            self.text.push(' ');
        }
        let _ = write!(self.text, "{words}");
        self
    }

    /// From this range.
    pub(crate) fn source(self, range: IpNet) -> Self {
        // A range of everything is no match at all.
        if range.prefix_len() == 0 { self } else { self.words(format_args!("-s {range}")) }
    }

    /// To this range.
    pub(crate) fn destination(self, range: IpNet) -> Self {
        if range.prefix_len() == 0 { self } else { self.words(format_args!("-d {range}")) }
    }

    /// This transport protocol.
    pub(crate) fn protocol(self, protocol: Protocol) -> Self {
        self.words(format_args!("-p {}", protocol_name(protocol)))
    }

    /// What people read; all but plain characters in it is replaced.
    pub(crate) fn comment(self, comment: impl fmt::Display) -> Self {
        let mut comment: String = comment
            .to_string()
            .chars()
            // What `iptables-save` puts a backslash before would not be found again.
            .map(|c| match c {
                '"' | '\'' | '\\' => '_',
                ' '..='~' => c,
                _ => '_',
            })
            .collect();
        comment.truncate(COMMENT_MAX);
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        if !comment.is_empty() && comment.chars().all(plain) {
            self.words(format_args!("-m comment --comment {comment}"))
        } else {
            self.words(format_args!("-m comment --comment \"{comment}\""))
        }
    }

    /// As [`Self::comment`], if there should be comments.
    pub(crate) fn comment_if(self, commented: bool, comment: impl fmt::Display) -> Self {
        if commented { self.comment(comment) } else { self }
    }

    /// To this port of a protocol, which was matched before.
    pub(crate) fn port(self, protocol: Protocol, port: u16) -> Self {
        self.words(format_args!("-m {} --dport {port}", protocol_name(protocol)))
    }

    /// One packet of so many, by chance.
    pub(crate) fn one_of(self, count: usize) -> Self {
        // The kernel keeps a number of 31 bits, and that is what it prints.
        let scale = 1u64 << 31;
        let count = count.max(1) as u64;
        let kept = (scale + count / 2) / count;
        let probability = kept as f64 / scale as f64;
        self.words(format_args!("-m statistic --mode random --probability {probability:.11}"))
    }

    /// The target, and the end.
    pub(crate) fn jump(self, target: impl fmt::Display) -> Arc<str> {
        self.words(format_args!("-j {target}")).end()
    }

    /// The end of a rule that has no target.
    pub(crate) fn end(self) -> Arc<str> {
        self.text.into()
    }
}

/// A range with nothing but this address.
pub(crate) fn host(address: IpAddr) -> IpNet {
    address.into()
}

/// How a list of recent clients says that it looks at whole source addresses.
pub(crate) fn recent_mask(family: Family) -> &'static str {
    match family {
        Family::V4 => "--mask 255.255.255.255 --rsource",
        Family::V6 => "--mask ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff --rsource",
    }
}

/// The reject that clients understand at once.
pub(crate) fn reject(family: Family, protocol: Protocol) -> &'static str {
    match (family, protocol) {
        (Family::V4, _) => "REJECT --reject-with icmp-port-unreachable",
        // A connection of the node itself hears of an ICMPv6 error only when it tries again, which
        // takes a second and more.
        (Family::V6, Protocol::Tcp) => "REJECT --reject-with tcp-reset",
        (Family::V6, _) => "REJECT --reject-with icmp6-port-unreachable",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_can_neither_end_their_quotes_nor_their_line() {
        let long = "x/".repeat(200);
        for (comment, expected) in [
            ("plain", "-m comment --comment plain".to_owned()),
            ("a/b:c", "-m comment --comment \"a/b:c\"".to_owned()),
            ("", "-m comment --comment \"\"".to_owned()),
            ("it's", "-m comment --comment it_s".to_owned()),
            ("a\" -j ACCEPT\n-F \\ é", "-m comment --comment \"a_ -j ACCEPT_-F _ _\"".to_owned()),
            (&long, format!("-m comment --comment \"{}\"", &long[..255])),
        ] {
            assert_eq!(&*Rule::new().comment(comment).end(), expected);
        }
    }

    #[test]
    fn chances_are_printed_as_the_kernel_keeps_them() {
        for (count, expected) in [(1, "1.00000000000"), (2, "0.50000000000"), (3, "0.33333333349")]
        {
            let rule = Rule::new().one_of(count).end();
            assert!(rule.ends_with(expected), "{rule}");
        }
    }
}
