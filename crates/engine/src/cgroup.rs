//! Where the limits of this process's control groups are written (the kernel's documents `cgroup-v2` and `cgroup-v1`). Containers and
//! services are held by them, and neither the machine's memory nor its number of CPUs says so.

use std::fs::read_to_string;
use std::path::{Component, Path, PathBuf};

/// Folders of the groups that hold this process for a controller such as `memory`, its own first, with those they lie in. `root` is `/`.
/// Some may not exist: inside a container the names are often those that the host uses.
pub fn folders(root: &Path, controller: &str) -> Vec<PathBuf> {
    let text = read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut all = Vec::new();
    for line in text.lines() {
        // Hierarchy, its controllers, path; version 2 is hierarchy 0 and names no controllers.
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let mounts = match controllers {
            "" => vec![root.join("sys/fs/cgroup"), root.join("sys/fs/cgroup/unified")],
            _ if controllers.split(',').any(|c| c == controller) => vec![root.join("sys/fs/cgroup").join(controller)],
            _ => continue,
        };
        let path: PathBuf = Path::new(path).components().filter(|c| matches!(c, Component::Normal(_))).collect();
        all.extend(mounts.iter().flat_map(|mount| path.ancestors().map(|group| mount.join(group))));
    }
    all
}

/// A number in a file of a group; `None` where there is no such file, and for `max`.
pub fn number(folder: &Path, file: &str) -> Option<u64> {
    read_to_string(folder.join(file)).ok()?.trim().parse().ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A made-up file system: paths and what they hold.
    pub(crate) fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn a_group_lies_in_others() {
        let root = tree(&[("proc/self/cgroup", "4:memory:/a/b\n3:cpu,cpuacct:/c\n0::/../d\n")]);
        let names = |controller| -> Vec<String> {
            let paths = folders(root.path(), controller);
            let name = |p: &PathBuf| p.strip_prefix(root.path().join("sys/fs/cgroup")).unwrap().display().to_string();
            paths.iter().map(name).collect()
        };
        assert_eq!(names("memory"), ["memory/a/b", "memory/a", "memory", "d", "", "unified/d", "unified"]);
        assert_eq!(names("cpu"), ["cpu/c", "cpu", "d", "", "unified/d", "unified"]);
        assert!(folders(&root.path().join("none"), "memory").is_empty());
    }
}
