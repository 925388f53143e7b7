//! Random changes; after each, the kernel's answer is what the documentation says.
//!
//! ```text
//!   steps ─► world ─┬─► objects ─► proxy ─► kernel ─┬─► packets, sampled ─────────┐
//!                   │                               ├─► rules, walked as packets ─┤ are equal
//!                   ├─► reference ──────────────────┼─────────────────────────────┘
//!                   └─► objects ─► fresh start ─────┴─► listing: is equal
//! ```
//!
//! | file | what it holds |
//! |---|---|
//! | [`world`] | Services, slices and the node as the steps leave them, and as the API has them |
//! | [`oddities`] | what may be wrong in them, or only looks so |
//! | [`reference`] | what comes of each connection, slow and obvious, from the documentation |
//! | [`steps`] | which changes there are |
//! | [`packet`] | a packet on its way through rules, and what may come of it |
//! | [`nftables`], [`iptables`] | the kernel's listing, as rules that a packet can be walked through |
//! | [`fresh`] | listings without what packets and chance put there |
//! | [`model_test`] | all of it together, for each backend and family |

mod fresh;
mod iptables;
mod model_test;
mod nftables;
mod oddities;
mod packet;
mod reference;
mod steps;
mod world;
