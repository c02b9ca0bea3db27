//! The demo model: a small trained Qwen3-MoE that is part of the program, so that every command has something to run where nothing
//! has been downloaded. `tools/demo-model` makes it.

use std::path::Path;

/// What a user calls it. A file of that name is `./demo`.
pub const NAME: &str = "demo";

/// A file's bytes where a mapping would begin as well: tensors lie at multiples of the file's alignment from there.
#[repr(C, align(65536))]
struct Aligned<T: ?Sized>(T);

static FILE: &Aligned<[u8]> = &Aligned(*include_bytes!("../assets/demo.gguf"));

/// Whether a path given for a model means the demo model.
pub fn is_meant(path: &Path) -> bool {
    path.as_os_str() == NAME
}

/// The model as a GGUF file.
pub fn bytes() -> &'static [u8] {
    &FILE.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_bare_name_means_it() {
        assert!(is_meant(Path::new("demo")));
        for path in ["./demo", "demo/", "/demo", "demo.gguf", "Demo", ""] {
            assert!(!is_meant(Path::new(path)), "{path:?}");
        }
        assert!(bytes().as_ptr().addr().is_multiple_of(65536) && bytes().starts_with(b"GGUF"));
    }
}
