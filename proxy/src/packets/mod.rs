//! What packets meet: every feature of Services, with real sockets, for each backend and family.
//!
//! ```text
//!   client 192.0.2.2, .3 ── host 192.0.2.1, 10.244.N.1 ── pod N 10.244.N.2   (odd: on this node)
//!                             └── a way out to nowhere
//! ```
//!
//! | file | what it holds |
//! |---|---|
//! | [`fixture`] | the network, and one connection as it looks from both ends |
//! | [`sctp`] | SCTP, where the kernel has it |
//! | [`backends`] | from objects to each backend, without the loop |
//! | [`features`], [`rows`] | the table: a Service, who asks, what comes of it, and where a backend differs |
//! | [`table_test`] | runs the table, with the iptables mode by both programs of that name |
//! | [`explain_test`] | asks for each row of the table why its packets go where they go |
//! | [`changes_test`] | what needs more than one step: even choice, affinity, flows of UDP |
//! | [`sctp_test`] | the table and those steps with SCTP: in the virtual machine of `tests/vm/proxy`, if not here |
//! | [`own_balancer_test`] | a node that sends from a load balancer's address |
//! | [`rejects_test`] | how refusals are told, and the guard of loopback |
//! | [`whole_test`] | both families at once, health checks, the node's own range of pods |
//! | [`model`] | random changes, and where packets should go, from the documentation |
//! | [`cluster`] | a stand-in for the API server, and whole proxies |
//! | [`load_test`] | clients without pause, while endpoints, the proxy and other programs change things |
//! | [`input_test`] | bad objects, and Services that want the same: who is told, and who is served |
//! | [`drift_test`] | each kind of edit by another program |

/// Makes a test of each function for each backend and family.
macro_rules! everywhere {
    ($($test:ident),+ $(,)?) => {
        everywhere!(@ Nftables nftables: $($test),+);
        everywhere!(@ Iptables iptables: $($test),+);
        everywhere!(@ Userspace userspace: $($test),+);
    };
    (@ $mode:ident $name:ident: $($test:ident),+) => {
        mod $name {
            use crate::{Mode, model::Family};

            mod v4 {
                use super::*;
                $(#[test] fn $test() { super::super::$test(Mode::$mode, Family::V4) })+
            }

            mod v6 {
                use super::*;
                $(#[test] fn $test() { super::super::$test(Mode::$mode, Family::V6) })+
            }
        }
    };
}

mod backends;
mod changes_test;
mod cluster;
mod drift_test;
mod explain_test;
mod features;
mod fixture;
mod input_test;
mod load_test;
mod model;
mod own_balancer_test;
mod rejects_test;
mod rows;
mod sctp;
mod sctp_test;
mod table_test;
mod whole_test;
