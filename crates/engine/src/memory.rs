//! How much memory this process can still get, and what a model needs: what a request is held against before anything is allocated; and
//! how much it had.

use std::fs::read_to_string;
use std::path::Path;

use apr_core::hparams::Hparams;

use crate::cgroup;

/// Bytes that can be allocated without swapping, as far as the system says: the smaller of what the kernel counts as available (proc(5)
/// `meminfo`) and what is left of the limits of the process's control groups. `None` where neither can be read.
///
/// Cached pages of files count as available, those of the model as well: the system drops them for whoever needs the memory.
pub fn available() -> Option<u64> {
    available_in(Path::new("/"))
}

/// What is available, where that is less than `need_bytes`.
pub fn shortage(need_bytes: u64) -> Option<u64> {
    available().filter(|&available| need_bytes > available)
}

/// Bytes of memory that the machine has.
pub fn total() -> Option<u64> {
    field(&read_to_string("/proc/meminfo").ok()?, "MemTotal:", 1024)
}

/// The most memory this process has had at one time, pages of mapped files among it (proc(5), `VmHWM`). `None` where the system does not
/// say.
pub fn peak_rss() -> Option<u64> {
    field(&read_to_string("/proc/self/status").ok()?, "VmHWM:", 1024)
}

/// The memory this process has now, as [`peak_rss`] counts it.
pub fn rss() -> Option<u64> {
    field(&read_to_string("/proc/self/status").ok()?, "VmRSS:", 1024)
}

/// Bytes of the buffers of a step of `n_tokens` of which one wants logits: activations, as floats and in their 8-bit form.
pub fn buffer_bytes(h: &Hparams, n_tokens: usize) -> u64 {
    let (k, n_ff, n_expert) = h.experts.as_ref().map_or((1, h.n_ff, 0), |e| (e.n_expert_used, e.n_ff_exp, e.n_expert));
    // Stream, norm and block output; queries, keys and values; attention; gate and up; each expert's output; routing.
    let floats = 3 * h.n_embd + h.heads.n_qkv() + h.heads.q().len() + 2 * k * n_ff + k * h.n_embd + n_expert + 2 * k;
    // Inputs of products: one byte a value, and its share of the scales and sums that kernels read beside it.
    let codes = (h.n_embd + h.heads.q().len() + k * n_ff) * 7 / 4;
    n_tokens as u64 * (4 * floats + codes) as u64 + 4 * h.n_vocab as u64
}

fn available_in(root: &Path) -> Option<u64> {
    let machine = read_to_string(root.join("proc/meminfo")).ok().and_then(|text| field(&text, "MemAvailable:", 1024));
    let groups = cgroup::folders(root, "memory");
    machine.into_iter().chain(groups.iter().filter_map(|folder| left(folder))).min()
}

/// What a control group may still take. Beyond `memory.high` its processes are slowed down until they take no more. Files' pages that
/// were read by the group are dropped when it needs them for something else.
fn left(folder: &Path) -> Option<u64> {
    let limits = ["memory.max", "memory.high", "memory.limit_in_bytes"];
    let limit = limits.iter().filter_map(|file| cgroup::number(folder, file)).min()?;
    let used = cgroup::number(folder, "memory.current").or_else(|| cgroup::number(folder, "memory.usage_in_bytes"))?;
    let stat = read_to_string(folder.join("memory.stat")).unwrap_or_default();
    // Version 1 counts groups below it under names of their own.
    let pages = |name: &str| field(&stat, &format!("total_{name}"), 1).or_else(|| field(&stat, name, 1)).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(pages("inactive_file") + pages("active_file"))))
}

/// The number behind `name` in lines of names and numbers.
fn field(text: &str, name: &str, unit: u64) -> Option<u64> {
    let mut words = text.lines().map(str::split_whitespace).find_map(|mut w| (w.next()? == name).then_some(w))?;
    words.next()?.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::tests::tree;

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal:       24689764 kB\nMemFree:          812 kB\nMemAvailable:   20123456 kB\n");

    #[test]
    fn available_memory_is_read_in_bytes() {
        assert_eq!(available_in(tree(&[MEMINFO]).path()), Some(20_123_456 * 1024));
        assert_eq!(available_in(tree(&[("proc/meminfo", "MemTotal: 1 kB")]).path()), None);
        assert_eq!(available_in(tree(&[]).path()), None);
    }

    #[test]
    fn limits_of_groups_hold_less_what_is_used_other_than_for_files() {
        let v2 = |max, high| {
            let stat = "anon 300\nfile 690\ninactive_file 200\nactive_file 500\n";
            let own = [("sys/fs/cgroup/a/b/memory.max", max), ("sys/fs/cgroup/a/b/memory.high", high)];
            let rest = [("sys/fs/cgroup/a/b/memory.current", "1000\n"), ("sys/fs/cgroup/a/b/memory.stat", stat)];
            let group = [MEMINFO, ("proc/self/cgroup", "0::/a/b\n")];
            available_in(tree(&[&group[..], &own, &rest].concat()).path())
        };
        assert_eq!(v2("4000\n", "max\n"), Some(3700));
        assert_eq!(v2("4000\n", "2000\n"), Some(1700));
        assert_eq!(v2("max\n", "max\n"), Some(20_123_456 * 1024));
        assert_eq!(v2("100\n", "max\n"), Some(0), "more is used than allowed");
    }

    #[test]
    fn a_group_around_the_own_one_holds_too_in_both_versions() {
        let outer = [("sys/fs/cgroup/a/memory.max", "500\n"), ("sys/fs/cgroup/a/memory.current", "100\n")];
        assert_eq!(available_in(tree(&[&[("proc/self/cgroup", "0::/a/b")], &outer[..]].concat()).path()), Some(400));
        let v1 = [
            ("proc/self/cgroup", "4:memory:/x\n0::/\n"),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "9000\n"),
            ("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "1000\n"),
            ("sys/fs/cgroup/memory/x/memory.stat", "inactive_file 1\ntotal_inactive_file 250\ntotal_active_file 150\n"),
        ];
        assert_eq!(available_in(tree(&v1).path()), Some(8400));
    }

    #[test]
    fn buffers_are_those_of_a_step() {
        use apr_core::backend::Backend;
        use apr_core::backend::reference::Reference;
        use apr_core::models;

        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny-qwen3moe.gguf");
        let file = crate::model_file::ModelFile::open(Path::new(path)).unwrap();
        let h = file.hparams().unwrap();
        let model = models::load(&Reference, &file.gguf, &h, &file.parts).unwrap();
        let s = models::state(&Reference, &h, &model);
        let routing = s.routing.as_ref().unwrap();
        let tensors = [&s.x, &s.xn, &s.qkv, &s.attn, &s.y, &s.ffn.gate, &s.ffn.up, &s.ffn.down, &routing.logits];
        let floats: usize = tensors.iter().map(|t| Reference.shape(t).1).sum();
        let per_token = buffer_bytes(&h, 1) - buffer_bytes(&h, 0);
        assert!(
            (1.0..1.5).contains(&(per_token as f64 / (4 * floats) as f64)),
            "{per_token} bytes for {floats} floats"
        );
        assert_eq!(buffer_bytes(&h, 0), 4 * h.n_vocab as u64);
        assert_eq!(buffer_bytes(&h, 100) - buffer_bytes(&h, 0), 100 * per_token);
    }
}
