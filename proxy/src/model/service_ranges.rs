//! Ranges that cluster addresses are taken from, as ServiceCIDR objects tell of them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
};

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::ServiceCIDR;

use super::Problem;

/// What no Service can be in: who drops what is sent there harms more than Services.
const RESERVED: [(&str, &str); 7] = [
    ("127.0.0.0/8", "loopback addresses"),
    ("::1/128", "loopback addresses"),
    ("169.254.0.0/16", "link-local addresses"),
    ("fe80::/10", "link-local addresses"),
    ("224.0.0.0/4", "multicast addresses"),
    ("ff00::/8", "multicast addresses"),
    ("::ffff:0:0/96", "IPv4 addresses in IPv6 form"),
];

/// The ranges of all objects.
#[derive(Clone, Debug, Default)]
pub(crate) struct ServiceRanges {
    by_object: BTreeMap<String, Vec<IpNet>>,
}

impl ServiceRanges {
    /// Takes in an object as it is now: what is wrong in it.
    pub(crate) fn set(&mut self, object: &ServiceCIDR) -> Vec<Problem> {
        let (ranges, problems) = read(object);
        self.by_object.insert(object.metadata.name.clone().unwrap_or_default(), ranges);
        problems
    }

    /// Takes in that an object is gone.
    pub(crate) fn remove(&mut self, name: &str) {
        self.by_object.remove(name);
    }

    /// All ranges, sorted and each once; they may overlap.
    pub(crate) fn all(&self) -> Vec<IpNet> {
        let mut all: Vec<IpNet> = self.by_object.values().flatten().copied().collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

fn read(object: &ServiceCIDR) -> (Vec<IpNet>, Vec<Problem>) {
    let (mut ranges, mut problems) = (Vec::new(), Vec::new());
    let texts = object.spec.iter().flat_map(|spec| spec.cidrs.iter().flatten());
    for text in texts {
        match usable_range(text) {
            Ok(range) => ranges.push(range),
            Err(why) => problems.push(Problem::new(
                "InvalidServiceCIDR",
                format!("the range {text:?} is passed over: {why}"),
            )),
        }
    }
    (ranges, problems)
}

fn usable_range(text: &str) -> Result<IpNet, String> {
    // Numbers with leading zeros are decimal to some programs and octal to others: an address alone
    // is read without them.
    let canonical =
        |text: &str| text.split('/').next().is_some_and(|a| a.parse::<IpAddr>().is_ok());
    let range = text.parse::<IpNet>().ok().filter(|_| canonical(text));
    let range = range.ok_or("it is not a range of addresses")?;
    let range = range.trunc();
    let unspecified = [IpAddr::from([0; 4]), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    if unspecified.contains(&range.addr()) {
        return Err("the unspecified address is in it".to_owned());
    }
    let overlaps = |reserved: &IpNet| reserved.contains(&range) || range.contains(reserved);
    let reserved = RESERVED.iter().find(|(text, _)| text.parse().is_ok_and(|r| overlaps(&r)));
    match reserved {
        Some((_, what)) => Err(format!("{what} are in it")),
        None => Ok(range),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(name: &str, cidrs: &[&str]) -> ServiceCIDR {
        let object = json!({"metadata": {"name": name}, "spec": {"cidrs": cidrs}});
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn ranges_in_which_there_are_no_services_are_passed_over() {
        for (text, expected) in [
            ("10.96.0.0/16", Ok("10.96.0.0/16")),
            ("10.96.1.2/16", Ok("10.96.0.0/16")),
            ("FD00:96:0::/108", Ok("fd00:96::/108")),
            ("192.0.2.7/32", Ok("192.0.2.7/32")),
            ("0.0.0.0/0", Err("unspecified")),
            ("::/0", Err("unspecified")),
            ("64.0.0.0/2", Err("loopback")),
            ("127.0.0.1/32", Err("loopback")),
            ("128.0.0.0/1", Err("link-local")),
            ("fe80::1/128", Err("link-local")),
            ("224.0.0.0/3", Err("multicast")),
            ("f000::/4", Err("link-local")),
            ("ff02::/16", Err("multicast")),
            ("::1/128", Err("loopback")),
            ("::ffff:10.96.0.0/112", Err("IPv4 addresses in IPv6 form")),
            ("::ffff:0:0/90", Err("IPv4 addresses in IPv6 form")),
            ("::/96", Err("unspecified")),
            ("10.96.0.0", Err("not a range")),
            ("010.96.0.0/16", Err("not a range")),
            ("10.96.0.0/33", Err("not a range")),
            ("", Err("not a range")),
        ] {
            let mut ranges = ServiceRanges::default();
            let problems = ranges.set(&object("kubernetes", &["192.0.2.9/32", text]));
            let others = ranges.all().into_iter().filter(|r| r.to_string() != "192.0.2.9/32");
            let found: Vec<String> = others.map(|range| range.to_string()).collect();
            match expected {
                Ok(range) => assert_eq!((found, problems), (vec![range.to_owned()], vec![])),
                Err(words) => {
                    assert!(found.is_empty(), "{text}: {found:?}");
                    assert!(problems[0].message.contains(words), "{text}: {problems:?}");
                }
            }
        }
    }

    #[test]
    fn an_object_takes_only_its_own_ranges_along() {
        let mut ranges = ServiceRanges::default();
        ranges.set(&object("a", &["10.96.0.0/16", "fd00:96::/108"]));
        ranges.set(&object("b", &["10.96.0.0/16"]));
        assert_eq!(ranges.all().len(), 2);
        ranges.remove("a");
        assert_eq!(ranges.all(), ["10.96.0.0/16".parse::<IpNet>().unwrap()]);
        ranges.set(&object("b", &[]));
        assert_eq!(ranges.all(), []);
    }
}
