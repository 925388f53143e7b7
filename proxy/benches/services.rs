//! Times of the proxy against the kernel: `cargo bench -p keelson-proxy`, or with sizes of one's own
//! `cargo bench -p keelson-proxy -- 1000x2 5006x50`. Needs root; everything happens in a network
//! namespace of its own.

use nix::sched::{CloneFlags, unshare};

/// Services and endpoints of each.
const SIZES: [(usize, usize); 7] =
    [(1_000, 2), (5_000, 2), (10_000, 2), (30_000, 2), (1, 5_000), (5_006, 50), (44_128, 1)];

fn main() {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        eprintln!("a network namespace is needed: {error}; run this as root");
        std::process::exit(1);
    }
    // `cargo bench` adds --bench.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let sizes: Option<Vec<(usize, usize)>> = wanted.iter().map(|text| size(text)).collect();
    let Some(mut sizes) = sizes else {
        eprintln!("sizes are Services and endpoints of each, as 1000x2: {}", wanted.join(" "));
        std::process::exit(2);
    };
    if sizes.is_empty() {
        sizes.extend(SIZES);
    }
    println!(
        "{:>8} {:>9} {:>10} {:>10} {:>11} {:>11} {:>11} {:>9} {:>12}",
        "services",
        "endpoints",
        "plan",
        "load",
        "change p50",
        "change p99",
        "restart",
        "resident",
        "restart peak"
    );
    for (services, endpoints) in sizes {
        match keelson_proxy::bench::measure(services, endpoints) {
            Ok(m) => println!(
                "{services:>8} {endpoints:>9} {:>10.1?} {:>10.1?} {:>11.1?} {:>11.1?} {:>11.1?} {:>6} MB {:>9} MB{}",
                m.plan,
                m.load,
                m.change,
                m.change_p99,
                m.restart,
                m.resident / 1_000_000,
                m.restart_peak / 1_000_000,
                if m.restart_elements == 0 { "" } else { "  (the restart wrote something!)" },
            ),
            Err(error) => {
                eprintln!("{services} services of {endpoints} endpoints: {error}");
                std::process::exit(1);
            }
        }
    }
}

fn size(text: &str) -> Option<(usize, usize)> {
    let (services, endpoints) = text.split_once('x')?;
    let number = |text: &str| text.parse().ok().filter(|n| *n > 0);
    Some((number(services)?, number(endpoints)?))
}
