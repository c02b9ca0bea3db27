//! One step's work: which tokens, at which positions, of which sequences, and whose logits are wanted.
//!
//! Prefill chunks and decodes of many users are the same thing here: rows. A sequence's keys and values live in KV blocks of
//! [`KV_BLOCK`] positions; its table lists the blocks in order, so that sequences can share the blocks of a common prefix.

use std::ops::Range;

use crate::backend::KV_BLOCK;

/// One token of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub token: u32,
    /// Absolute position in its sequence, from 0.
    pub position: u32,
    /// Index into the batch's block tables.
    pub sequence: u32,
    /// Whether the row reaches the output: others are dropped after the last layer's attention.
    pub wants_logits: bool,
}

/// The rows of one step and the block tables of the sequences they belong to.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    rows: Vec<Row>,
    tables: Vec<Vec<u32>>,
    kept: Vec<u32>,
}

impl Batch {
    /// `tables[s]` lists the KV blocks of sequence `s`. Rows of one sequence stand together, in ascending position, and every
    /// position has a block.
    pub fn new(rows: Vec<Row>, tables: Vec<Vec<u32>>) -> Batch {
        let mut batch = Batch { rows, tables, kept: Vec::new() };
        batch.check();
        batch.kept.extend((0..batch.rows.len() as u32).filter(|&r| batch.rows[r as usize].wants_logits));
        batch
    }

    fn check(&self) {
        assert!(!self.rows.is_empty(), "a batch has at least one row");
        let mut seen = vec![false; self.tables.len()];
        for (i, row) in self.rows.iter().enumerate() {
            let s = row.sequence as usize;
            let follows = i > 0 && self.rows[i - 1].sequence == row.sequence;
            assert!(follows || !seen[s], "rows of sequence {s} stand together");
            assert!(!follows || self.rows[i - 1].position < row.position, "positions of sequence {s} ascend");
            assert!((row.position as usize) < self.tables[s].len() * KV_BLOCK, "position {} has a block", row.position);
            seen[s] = true;
        }
    }

    /// All rows, in order.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The KV blocks of sequence `s`, in order of position.
    pub fn table(&self, s: u32) -> &[u32] {
        &self.tables[s as usize]
    }

    /// The KV blocks of all sequences.
    pub fn tables(&self) -> &[Vec<u32>] {
        &self.tables
    }

    /// Indices of the rows that want logits, ascending.
    pub fn kept(&self) -> &[u32] {
        &self.kept
    }

    /// The absolute positions of a stage's rows, of which there are `n_rows`: all, or those that want logits.
    pub fn positions_of(&self, n_rows: usize) -> impl ExactSizeIterator<Item = u32> {
        let all = n_rows == self.rows.len();
        assert!(all || n_rows == self.kept.len(), "a stage has all rows or those that want logits");
        (0..n_rows).map(move |i| self.rows[if all { i } else { self.kept[i] as usize }].position)
    }

    /// Which of a stage's `n_rows` rows are those of sequence `s`.
    pub fn rows_of(&self, s: u32, n_rows: usize) -> Range<usize> {
        let all = n_rows == self.rows.len();
        assert!(all || n_rows == self.kept.len(), "a stage has all rows or those that want logits");
        let (mut first, mut n) = (None, 0);
        for i in 0..n_rows {
            let row = &self.rows[if all { i } else { self.kept[i] as usize }];
            if row.sequence == s {
                first.get_or_insert(i);
                n += 1;
            }
        }
        let first = first.unwrap_or(0);
        first..first + n
    }

    /// The rows of sequence `s` as a batch of their own; there is at least one.
    pub fn of_sequence(&self, s: u32) -> Batch {
        let rows = self.rows.iter().filter(|row| row.sequence == s).map(|row| Row { sequence: 0, ..*row });
        Batch::new(rows.collect(), vec![self.table(s).to_vec()])
    }

    /// The block and the slot in it that hold a row's key and value.
    pub fn slot(&self, row: &Row) -> (u32, usize) {
        let p = row.position as usize;
        (self.table(row.sequence)[p / KV_BLOCK], p % KV_BLOCK)
    }
}
