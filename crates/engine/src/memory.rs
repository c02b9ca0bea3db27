//! How much memory this process can still get: what a request is held against before anything is allocated.

use std::fs::read_to_string;

/// Bytes that can be allocated without swapping, as far as the system says: the smaller of what the kernel counts as available and
/// the control group's limit (proc(5) `meminfo`; the kernel's `cgroup-v2` document). `None` where neither can be read.
fn available() -> Option<u64> {
    let machine = read_to_string("/proc/meminfo").ok().and_then(|text| available_of(&text));
    let group = read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    machine.into_iter().chain(group).min()
}

/// What is available, where that is less than `need_bytes`.
pub fn shortage(need_bytes: u64) -> Option<u64> {
    available().filter(|&available| need_bytes > available)
}

/// `MemAvailable` of `/proc/meminfo`, which counts in KiB.
fn available_of(meminfo: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_in_bytes() {
        let text = "MemTotal:       24689764 kB\nMemFree:          812 kB\nMemAvailable:   20123456 kB\n";
        assert_eq!(available_of(text), Some(20_123_456 * 1024));
        assert_eq!(available_of("MemTotal: 1 kB"), None);
    }
}
