//! Quant types: how GGUF stores a row of weights, one table row and one file per type.
//!
//! Every type cuts a row into blocks of [`GgmlType::block_len`] weights stored in [`GgmlType::block_bytes`] bytes. Block layouts
//! follow ggml (`ggml-common.h` of llama.cpp is the format's definition).

/// A tensor type of the GGUF format that `apr` reads. Spelled as ggml spells it.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
}

/// Type, GGUF id, name, weights per block, bytes per block.
const TABLE: [(GgmlType, u32, &str, usize, usize); 16] = [
    (GgmlType::F32, 0, "F32", 1, 4),
    (GgmlType::F16, 1, "F16", 1, 2),
    (GgmlType::BF16, 30, "BF16", 1, 2),
    (GgmlType::Q4_0, 2, "Q4_0", 32, 18),
    (GgmlType::Q4_1, 3, "Q4_1", 32, 20),
    (GgmlType::Q5_0, 6, "Q5_0", 32, 22),
    (GgmlType::Q5_1, 7, "Q5_1", 32, 24),
    (GgmlType::Q8_0, 8, "Q8_0", 32, 34),
    (GgmlType::Q2_K, 10, "Q2_K", 256, 84),
    (GgmlType::Q3_K, 11, "Q3_K", 256, 110),
    (GgmlType::Q4_K, 12, "Q4_K", 256, 144),
    (GgmlType::Q5_K, 13, "Q5_K", 256, 176),
    (GgmlType::Q6_K, 14, "Q6_K", 256, 210),
    (GgmlType::IQ4_NL, 20, "IQ4_NL", 32, 18),
    (GgmlType::IQ4_XS, 23, "IQ4_XS", 256, 136),
    (GgmlType::MXFP4, 39, "MXFP4", 32, 17),
];

/// Ids that ggml defines and `apr` does not read, so that a refusal can name them.
const UNSUPPORTED: [(u32, &str); 20] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
];

impl GgmlType {
    /// Every type that can be read, in the order of the table.
    pub const ALL: [GgmlType; 16] = {
        let mut all = [GgmlType::F32; 16];
        let mut i = 0;
        while i < 16 {
            all[i] = TABLE[i].0;
            i += 1;
        }
        all
    };

    fn row(self) -> &'static (GgmlType, u32, &'static str, usize, usize) {
        &TABLE[self as usize]
    }

    /// The type with this id in a GGUF file, if it can be read.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        TABLE.iter().find(|r| r.1 == id).map(|r| r.0)
    }

    /// What ggml calls the type with this id, readable or not.
    pub fn name_of_id(id: u32) -> Option<&'static str> {
        let readable = TABLE.iter().find(|r| r.1 == id).map(|r| r.2);
        readable.or_else(|| UNSUPPORTED.iter().find(|r| r.0 == id).map(|r| r.1))
    }

    /// The id in a GGUF file.
    pub fn id(self) -> u32 {
        self.row().1
    }

    /// The name, as in `Q4_K`.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Weights per block.
    pub fn block_len(self) -> usize {
        self.row().3
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        self.row().4
    }

    /// Bytes of a row of `n` weights; `n` is a multiple of [`block_len`](Self::block_len).
    pub fn row_bytes(self, n: usize) -> usize {
        assert_eq!(n % self.block_len(), 0, "a row of {} holds whole blocks", self.name());
        n / self.block_len() * self.block_bytes()
    }

    /// True for the types whose weights are plain floats, which are never multiplied with quantized activations.
    pub fn is_float(self) -> bool {
        matches!(self, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16)
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, i);
            assert_eq!(GgmlType::from_id(row.1), Some(row.0));
        }
    }
}
