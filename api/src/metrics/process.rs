//! What the kernel counts of this process, under the names that Prometheus' clients share.

use std::fs;

use prometheus::{
    Counter, Gauge,
    core::{Collector, Desc},
    proto::MetricFamily,
};

/// The kernel's clock ticks in a second, as it shows them to every process.
const TICKS: f64 = 100.0;
const PAGE: f64 = 4096.0;

/// Reads `/proc/self` whenever it is asked.
#[derive(Debug)]
pub struct Process {
    cpu: Counter,
    open_files: Gauge,
    max_files: Gauge,
    resident: Gauge,
    virtual_memory: Gauge,
    max_virtual_memory: Gauge,
    started: Gauge,
}

/// What is in `/proc/self` and `/proc/stat`.
#[derive(Debug, Default, PartialEq)]
struct Read {
    cpu: f64,
    resident: f64,
    virtual_memory: f64,
    started: f64,
}

impl Process {
    /// A collector of this process.
    ///
    /// # Errors
    /// Never with these names.
    pub fn new() -> Result<Self, prometheus::Error> {
        Ok(Self {
            cpu: Counter::new("process_cpu_seconds_total", "Time on a CPU, in seconds.")?,
            open_files: Gauge::new("process_open_fds", "Open file descriptors.")?,
            max_files: Gauge::new("process_max_fds", "The most file descriptors it may open.")?,
            resident: Gauge::new("process_resident_memory_bytes", "Resident memory, in bytes.")?,
            virtual_memory: Gauge::new(
                "process_virtual_memory_bytes",
                "Virtual memory, in bytes.",
            )?,
            max_virtual_memory: Gauge::new(
                "process_virtual_memory_max_bytes",
                "The most virtual memory it may have, in bytes; -1 for any.",
            )?,
            started: Gauge::new(
                "process_start_time_seconds",
                "When it started, in seconds since 1970.",
            )?,
        })
    }

    fn all(&self) -> [&dyn Collector; 7] {
        [
            &self.cpu,
            &self.open_files,
            &self.max_files,
            &self.resident,
            &self.virtual_memory,
            &self.max_virtual_memory,
            &self.started,
        ]
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        self.all().into_iter().flat_map(|metric| metric.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let text = |path| fs::read_to_string(path).unwrap_or_default();
        if let Some(read) = read(&text("/proc/self/stat"), &text("/proc/stat")) {
            self.cpu.inc_by((read.cpu - self.cpu.get()).max(0.0));
            self.resident.set(read.resident);
            self.virtual_memory.set(read.virtual_memory);
            self.started.set(read.started);
        }
        if let Ok(files) = fs::read_dir("/proc/self/fd") {
            // The one that reads the folder is open for a moment only.
            self.open_files.set(files.count().saturating_sub(1) as f64);
        }
        let limits = text("/proc/self/limits");
        self.max_files.set(limit(&limits, "Max open files"));
        self.max_virtual_memory.set(limit(&limits, "Max address space"));
        self.all().into_iter().flat_map(Collector::collect).collect()
    }
}

/// From the texts of `/proc/self/stat` and `/proc/stat`.
fn read(own: &str, whole: &str) -> Option<Read> {
    // The program's name is in parentheses and may hold anything.
    let fields: Vec<&str> = own.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    // proc(5) counts from 1, and the name is the second.
    let field = |n: usize| fields.get(n - 3)?.parse::<f64>().ok();
    let boot = whole.lines().find_map(|line| line.strip_prefix("btime "))?;
    Some(Read {
        cpu: (field(14)? + field(15)?) / TICKS,
        virtual_memory: field(23)?,
        resident: field(24)? * PAGE,
        started: boot.trim().parse::<f64>().ok()? + field(22)? / TICKS,
    })
}

/// The soft limit in a line of `/proc/self/limits`; -1 for none.
fn limit(limits: &str, name: &str) -> f64 {
    let line = limits.lines().find_map(|line| line.strip_prefix(name));
    let soft = line.and_then(|line| line.split_ascii_whitespace().next());
    soft.and_then(|soft| soft.parse().ok()).unwrap_or(-1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_prints_is_read() {
        let own = "7 (a) b (c)) S 1 7 7 0 -1 4194560 900 0 0 0 150 50 0 0 20 0 9 0 500 1048576 25 \
                   18446744073709551615 1";
        let read = read(own, "cpu 1 2\nbtime 1000\nprocesses 3\n").unwrap();
        let expected =
            Read { cpu: 2.0, resident: 102_400.0, virtual_memory: 1_048_576.0, started: 1005.0 };
        assert_eq!(read, expected);
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax address space  unlimited  \
                      unlimited  bytes\nMax open files  1024  4096  files\n";
        assert_eq!(
            (limit(limits, "Max open files"), limit(limits, "Max address space")),
            (1024.0, -1.0)
        );
    }

    #[test]
    fn this_process_has_memory_files_and_a_start() {
        let registry = prometheus::Registry::new();
        registry.register(Box::new(Process::new().unwrap())).unwrap();
        let value = |name: &str| {
            let text = crate::metrics::encode(&registry).unwrap();
            let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap();
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
        };
        assert!(value("process_resident_memory_bytes") > 100_000.0);
        let now = jiff::Timestamp::now().as_second() as f64;
        let age = now - value("process_start_time_seconds");
        assert!((-2.0..3600.0).contains(&age), "{age}");
        let before = value("process_open_fds");
        let _file = fs::File::open("/proc/self/stat").unwrap();
        assert!(value("process_open_fds") > before - 1.0);
        assert!(value("process_max_fds") > 0.0);
    }
}
