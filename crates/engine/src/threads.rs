//! How many threads compute where nobody says: one per core that this process may use.
//!
//! Two hardware threads of a core share its multipliers, which the kernels keep busy from one of them. Fast and slow cores of a hybrid
//! CPU all count: tasks are handed out as threads become free, so a slow core takes fewer. Threads are not pinned, and memory is not
//! placed: on a machine of several sockets the system does both.

use std::collections::BTreeSet;
use std::fs::read_to_string;
use std::path::Path;

use crate::cgroup;

/// More threads than this are taken for a typing error.
pub const THREADS_MAX: usize = 1024;

/// Threads that compute by default: the cores among the CPUs this process may use, or the CPU time its control groups grant if that is
/// less, rounded up. The last thread then stands still for part of the time, which is still faster than without it.
pub fn default_threads() -> usize {
    default_in(Path::new("/"))
}

/// As [`default_threads`] from the files under `root`; where the system has no such files, what the standard library says.
fn default_in(root: &Path) -> usize {
    let cores = cores(root).unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    let granted = cgroup::folders(root, "cpu").iter().filter_map(|folder| granted(folder)).min();
    granted.map_or(cores, |n| cores.min(n)).clamp(1, THREADS_MAX)
}

/// Cores among the CPUs this process may use (proc(5) `status`; the kernel's `cputopology` document).
fn cores(root: &Path) -> Option<usize> {
    let status = read_to_string(root.join("proc/self/status")).ok()?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let topology = |cpu: usize, file: &str| {
        read_to_string(root.join(format!("sys/devices/system/cpu/cpu{cpu}/topology/{file}"))).ok()
    };
    // CPUs of one core name the same siblings. One that names none is a core of its own.
    let core = |cpu: usize| {
        let siblings = topology(cpu, "core_cpus_list").or_else(|| topology(cpu, "thread_siblings_list"));
        siblings.unwrap_or_else(|| cpu.to_string()).trim().to_string()
    };
    let cores: BTreeSet<String> = cpu_list(allowed)?.into_iter().map(core).collect();
    (!cores.is_empty()).then_some(cores.len())
}

/// CPUs of a list such as `0-3,8`.
fn cpu_list(text: &str) -> Option<BTreeSet<usize>> {
    let mut cpus = BTreeSet::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cpus.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(cpus)
}

/// CPUs' worth of time that a group grants, rounded up; `None` without a limit.
fn granted(folder: &Path) -> Option<usize> {
    let v2 = read_to_string(folder.join("cpu.max")).ok().and_then(|text| {
        let (quota, period) = text.trim().split_once(' ')?;
        Some((quota.parse::<u64>().ok()?, period.parse::<u64>().ok()?))
    });
    let v1 = || Some((cgroup::number(folder, "cpu.cfs_quota_us")?, cgroup::number(folder, "cpu.cfs_period_us")?));
    let (quota, period) = v2.or_else(v1).filter(|(_, period)| *period > 0)?;
    Some(quota.div_ceil(period) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::tests::tree;

    /// Threads on a machine whose CPUs name these siblings, of which a process may use `allowed`, with more files.
    fn threads(allowed: &str, siblings: &[&str], more: &[(&str, &str)]) -> usize {
        let status = format!("Name:\tapr\nCpus_allowed:\tff\nCpus_allowed_list:\t{allowed}\n");
        let paths: Vec<String> = (0..siblings.len())
            .map(|cpu| format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
            .collect();
        let mut files = vec![("proc/self/status", status.as_str())];
        files.extend(paths.iter().map(String::as_str).zip(siblings.iter().copied()));
        files.extend(more);
        default_in(tree(&files).path())
    }

    #[test]
    fn one_thread_per_core() {
        assert_eq!(threads("0-3", &["0\n", "1\n", "2\n", "3\n"], &[]), 4);
        assert_eq!(threads("0-7", &["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"], &[]), 4, "SMT");
        assert_eq!(threads("0-5", &["0-1", "0-1", "2-3", "2-3", "4", "5"], &[]), 4, "two fast cores, two slow ones");
        assert_eq!(threads("0", &["0"], &[]), 1);
    }

    #[test]
    fn the_newer_name_of_siblings_comes_first() {
        let newer = ("sys/devices/system/cpu/cpu1/topology/core_cpus_list", "0-1");
        let newer_0 = ("sys/devices/system/cpu/cpu0/topology/core_cpus_list", "0-1");
        assert_eq!(threads("0-1", &["0", "1"], &[newer_0, newer]), 1);
    }

    #[test]
    fn only_cpus_that_may_be_used_count() {
        let smt = ["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"];
        assert_eq!(threads("0,4", &smt, &[]), 1, "both halves of one core");
        assert_eq!(threads("0-1,6", &smt, &[]), 3);
        assert_eq!(threads("4-7", &smt, &[]), 4);
    }

    #[test]
    fn without_topology_every_cpu_is_a_core_and_without_anything_the_library_says() {
        assert_eq!(threads("0-5", &[], &[]), 6);
        let library = std::thread::available_parallelism().unwrap().get();
        assert_eq!(default_in(tree(&[]).path()), library);
        assert_eq!(threads("none", &[], &[]), library);
    }

    #[test]
    fn time_that_is_granted_is_a_limit_rounded_up() {
        let four = ["0", "1", "2", "3"];
        let v2 = |max| threads("0-3", &four, &[("proc/self/cgroup", "0::/a/b"), ("sys/fs/cgroup/a/cpu.max", max)]);
        assert_eq!(v2("150000 100000\n"), 2);
        assert_eq!(v2("50000 100000\n"), 1);
        assert_eq!(v2("max 100000\n"), 4);
        assert_eq!(v2("800000 100000\n"), 4, "more than there is");
        assert_eq!(v2("150000 0\n"), 4, "nonsense");
        let v1 = |quota| {
            let period = ("sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n");
            let quota = ("sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", quota);
            threads("0-3", &four, &[("proc/self/cgroup", "1:cpu:/a"), quota, period])
        };
        assert_eq!(v1("200000\n"), 2);
        assert_eq!(v1("-1\n"), 4);
    }

    #[test]
    fn this_machine_has_a_thread_at_least() {
        let library = std::thread::available_parallelism().unwrap().get();
        // The library rounds what is granted down, but never below one.
        assert!((1..=library + 1).contains(&default_threads()));
    }
}
