//! Rules as text, against files that were looked at.

use super::{Settings, Variant};
use crate::{
    config::{DetectLocal, NodePortAddresses},
    model::Family,
};

pub(super) fn settings(family: Family) -> Settings {
    Settings {
        family,
        variant: Variant::Host,
        detect_local: DetectLocal::Ranges(vec![
            "10.244.0.0/16".parse().unwrap(),
            "fd00:244::/32".parse().unwrap(),
        ]),
        masquerade_all: false,
        masquerade_mark: 0x4000,
        node_port_addresses: NodePortAddresses::Ranges(vec![
            "0.0.0.0/0".parse().unwrap(),
            "::/0".parse().unwrap(),
        ]),
        localhost_node_ports: true,
        tcp_be_liberal: false,
    }
}
