//! How much memory the process and its shims hold when nothing happens.

use std::{
    fs,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::Context;

use crate::{
    inside::inside_async,
    node::Running,
    pods,
    report::{Figure, Section, Unit},
    statistics::Samples,
};

/// Nothing changes by more than a hundredth for so long: then it is idle.
const QUIET: Duration = Duration::from_secs(5);
/// When it does not get quiet, it is measured anyway.
const PATIENCE: Duration = Duration::from_secs(60);

/// Measures with one pod and with `many`.
pub(crate) fn measure(many: usize) -> anyhow::Result<Section> {
    let running = Running::start()?;
    running.cluster.make_busybox_image();
    let (data_dir, netns) = (running.data_dir(), running.cluster.machine.netns());
    let pid = running.cluster.pid();

    eprintln!("memory: 1 pod");
    inside_async(&netns, || pods::create_all(&data_dir, vec!["pod-1".to_owned()]))?;
    let one = settled(pid)?;
    let cpu_one = idle_cpu(pid)?;
    eprintln!("memory: {many} pods");
    let names = (2..=many).map(|number| format!("pod-{number}")).collect();
    let all_ready = inside_async(&netns, || pods::create_all(&data_dir, names))?;
    let all = settled(pid)?;
    let cpu_all = idle_cpu(pid)?;

    let (shims, contained) = of_pods(&data_dir)?;
    let kubectl = peak_of_kubectl(&running)?;
    running.stop();

    let beside = "kubectl get pods, peak";
    Ok(Section {
        title: "Memory when idle: the whole of `keelson up` (API server, store, scheduler, controllers, DNS, \
                kubelet, proxy), and its shims"
            .to_owned(),
        command: "tools/bench --only memory".to_owned(),
        figures: vec![
            Figure::new("1 pod: resident", Unit::Megabytes, Samples::one(one.resident))
                .beside(beside, Samples::one(kubectl))
                .aim(50.0),
            Figure::new("1 pod: private", Unit::Megabytes, Samples::one(one.private)),
            Figure::new("1 pod: processor time", Unit::Percent, Samples::one(cpu_one)),
            Figure::new(format!("{many} pods: resident"), Unit::Megabytes, Samples::one(all.resident))
                .beside(beside, Samples::one(kubectl))
                .aim(50.0),
            Figure::new(format!("{many} pods: private"), Unit::Megabytes, Samples::one(all.private)),
            Figure::new(format!("{many} pods: processor time"), Unit::Percent, Samples::one(cpu_all)),
            Figure::new("a shim: private", Unit::Megabytes, shims)
                .beside("the sh in its pod", contained)
                .aim(3.0),
            Figure::new(
                format!("{} pods created at once → all Ready", many.saturating_sub(1)),
                Unit::Milliseconds,
                Samples::one(all_ready),
            ),
        ],
    })
}

/// Memory of one process, in millions of bytes.
#[derive(Clone, Copy, Debug)]
struct Memory {
    resident: f64,
    private: f64,
}

impl Memory {
    fn of(pid: i32) -> anyhow::Result<Self> {
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            fs::read_to_string(&path).context(path)
        };
        let rollup = read("smaps_rollup")?;
        Ok(Self {
            resident: megabytes(&read("status")?, &["VmRSS"]),
            private: megabytes(&rollup, &["Private_Clean", "Private_Dirty"]),
        })
    }
}

/// The resident memory of a process, in millions of bytes.
pub(crate) fn resident(pid: i32) -> anyhow::Result<f64> {
    Ok(Memory::of(pid)?.resident)
}

/// The sum of some lines `Name:  123 kB`, in millions of bytes.
fn megabytes(text: &str, names: &[&str]) -> f64 {
    let kilobytes: f64 = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| names.contains(name))
        .filter_map(|(_, value)| value.trim().trim_end_matches(" kB").parse::<f64>().ok())
        .sum();
    kilobytes * 1024.0 / 1e6
}

/// Waits until a process's memory stays as it is.
fn settled(pid: i32) -> anyhow::Result<Memory> {
    let start = Instant::now();
    let (mut last, mut since) = (Memory::of(pid)?, Instant::now());
    while since.elapsed() < QUIET && start.elapsed() < PATIENCE {
        // What is measured is time without change.
        std::thread::sleep(Duration::from_millis(250));
        let now = Memory::of(pid)?;
        if (now.resident - last.resident).abs() > last.resident / 100.0 {
            (last, since) = (now, Instant::now());
        }
    }
    Memory::of(pid)
}

/// How much of one processor a process takes, in hundredths, over ten seconds.
fn idle_cpu(pid: i32) -> anyhow::Result<f64> {
    let (before, start) = (ticks(pid)?, Instant::now());
    std::thread::sleep(Duration::from_secs(10));
    // /proc counts in hundredths of a second (USER_HZ is 100 on all of Linux's architectures here).
    Ok((ticks(pid)? - before) / start.elapsed().as_secs_f64())
}

/// Processor time that a process has had, in hundredths of a second.
///
/// # Errors
/// When there is no such process.
pub(crate) fn ticks(pid: i32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).context(path)?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    // utime and stime are fields 14 and 15; the state, field 3, is the first one here.
    let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<f64>().ok());
    field(14).zip(field(15)).map(|(user, system)| user + system).context("times of a process")
}

/// The private memory of every shim whose program lies in the data folder, and of a process in its
/// pod.
fn of_pods(data_dir: &Path) -> anyhow::Result<(Samples, Samples)> {
    let is_shim = |pid: i32| {
        fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|program| {
            program.starts_with(data_dir)
                && program
                    .file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with("keelson-shim"))
        })
    };
    let pids: Vec<i32> = fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .collect();
    let shims: Vec<i32> = pids.iter().copied().filter(|pid| is_shim(*pid)).collect();
    let (mut of_shims, mut of_others) = (Samples::default(), Samples::default());
    for pid in &shims {
        of_shims.add(Memory::of(*pid)?.private);
        let children = format!("/proc/{pid}/task/{pid}/children");
        let children = fs::read_to_string(&children).context(children)?;
        for child in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            of_others.add(Memory::of(child)?.private);
        }
    }
    anyhow::ensure!(of_shims.count() > 0, "no shim runs from {}", data_dir.display());
    Ok((of_shims, of_others))
}

/// The most memory that `kubectl get pods` held, in millions of bytes.
fn peak_of_kubectl(running: &Running) -> anyhow::Result<f64> {
    let child = running
        .cluster
        .kubectl_command(&["get", "pods", "-A"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("kubectl")?;
    peak(child)
}

/// Waits for a child and says how much memory it held at most, in millions of bytes.
fn peak(child: std::process::Child) -> anyhow::Result<f64> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    let mut status = 0;
    // SAFETY: both pointers are to memory of this frame, and the child has not been waited for.
    let waited =
        unsafe { libc::wait4(child.id() as libc::pid_t, &raw mut status, 0, usage.as_mut_ptr()) };
    anyhow::ensure!(waited > 0 && status == 0, "kubectl ended with {status}");
    // SAFETY: zeroed is a valid rusage, and wait4 has filled it in.
    let usage = unsafe { usage.assume_init() };
    Ok(usage.ru_maxrss as f64 * 1024.0 / 1e6)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn memory_is_read_in_kilobytes() {
        let text = "Rss:   2048 kB\nPrivate_Clean:   1000 kB\nPrivate_Dirty:  1000 kB\n";
        assert_eq!(megabytes(text, &["Private_Clean", "Private_Dirty"]), 2.048);
        assert!(Memory::of(std::process::id() as i32).unwrap().resident > 0.0);
        assert!(ticks(std::process::id() as i32).unwrap() >= 0.0);
        let child = Command::new("true").spawn().unwrap();
        assert!(peak(child).unwrap() > 0.0);
    }
}
