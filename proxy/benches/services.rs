//! Times of the proxy against the kernel: `cargo bench -p keelson-proxy`. Needs root; everything
//! happens in a network namespace of its own.

use nix::sched::{CloneFlags, unshare};

fn main() {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        eprintln!("a network namespace is needed: {error}; run this as root");
        std::process::exit(1);
    }
    println!(
        "{:>8} {:>9} {:>10} {:>10} {:>11} {:>11} {:>11} {:>9}",
        "services", "endpoints", "plan", "load", "change p50", "change p99", "restart", "resident"
    );
    for (services, endpoints) in
        [(1_000, 2), (5_000, 2), (10_000, 2), (30_000, 2), (5_006, 50), (44_128, 1)]
    {
        match keelson_proxy::bench::measure(services, endpoints) {
            Ok(m) => println!(
                "{services:>8} {endpoints:>9} {:>10.1?} {:>10.1?} {:>11.1?} {:>11.1?} {:>11.1?} {:>6} MB{}",
                m.plan,
                m.load,
                m.change,
                m.change_p99,
                m.restart,
                m.resident / 1_000_000,
                if m.restart_elements == 0 { "" } else { "  (the restart wrote something!)" },
            ),
            Err(error) => {
                eprintln!("{services} services of {endpoints} endpoints: {error}");
                std::process::exit(1);
            }
        }
    }
}
