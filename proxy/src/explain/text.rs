//! The answer for people.

use std::fmt;

use super::{Explanation, Origin, Verdict};

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let origin = match self.origin {
            Origin::Pod => "a pod",
            Origin::Node => "the node itself",
            Origin::Outside => "outside the cluster",
        };
        writeln!(f, "packet      {} (from {origin})", self.packet)?;
        writeln!(f, "proxy       that of the node {}", self.node)?;
        for (n, note) in self.notes.iter().enumerate() {
            let title = if n == 0 { "note" } else { "" };
            writeln!(f, "{title:11} {note}")?;
        }
        let verdict = match self.verdict {
            Verdict::Forwarded => "forwarded",
            Verdict::Dropped => "dropped",
            Verdict::Rejected => "rejected",
            Verdict::Answered => "answered by the proxy itself",
            Verdict::NotServices => "not the proxy's business",
        };
        writeln!(f, "verdict     {verdict}: {}", self.reason)?;
        if let Some(service) = &self.service {
            let port = self.service_port.as_deref().unwrap_or("?");
            writeln!(
                f,
                "service     {service} port {port}, by its {}",
                self.reached_as.unwrap_or("address")
            )?;
        }
        for (n, rule) in self.rules.iter().enumerate() {
            let title = if n == 0 { "rules" } else { "" };
            writeln!(f, "{title:11} {rule}")?;
        }
        if let Some((hidden, why)) = self.masquerade {
            let seen = if hidden { "the node's address" } else { "the client's address" };
            writeln!(f, "source      the endpoint sees {seen}: {why}")?;
        }
        if let Some(seconds) = self.affinity_seconds {
            writeln!(f, "affinity    a client stays with its endpoint for {seconds} s")?;
        }
        for (title, eligible) in [("eligible", true), ("not", false)] {
            let these = self.endpoints.iter().filter(|endpoint| endpoint.eligible == eligible);
            for (n, endpoint) in these.enumerate() {
                let title = if n == 0 { title } else { "" };
                writeln!(f, "{title:11} {}: {}", endpoint.endpoint, endpoint.why)?;
            }
        }
        match &self.kernel {
            None => Ok(()),
            Some(differences) if differences.is_empty() => {
                writeln!(f, "kernel      has the same")
            }
            Some(differences) => differences.iter().enumerate().try_for_each(|(n, difference)| {
                let title = if n == 0 { "kernel" } else { "" };
                writeln!(f, "{title:11} {difference}")
            }),
        }
    }
}
