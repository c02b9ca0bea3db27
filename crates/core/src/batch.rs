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
    pub wants: Wants,
}

/// How far a row goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub enum Wants {
    /// Its keys and values: it is dropped after the last layer's attention.
    Nothing,
    /// The final norm: it is dropped before the output matrix.
    FinalNorm,
    Logits,
}

/// The rows of one step and the block tables of the sequences they belong to.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    rows: Vec<Row>,
    tables: Vec<Vec<u32>>,
    kept: Vec<u32>,
    /// Of the kept rows, where there are others too.
    kept_for_logits: Option<Vec<u32>>,
}

impl Batch {
    /// `tables[s]` lists the KV blocks of sequence `s`. Rows of one sequence stand together, in ascending position, and every
    /// position has a block.
    pub fn new(rows: Vec<Row>, tables: Vec<Vec<u32>>) -> Batch {
        let mut batch = Batch { rows, tables, kept: Vec::new(), kept_for_logits: None };
        batch.check();
        let wants = |r: u32| batch.rows[r as usize].wants;
        let kept: Vec<u32> = (0..batch.rows.len() as u32).filter(|&r| wants(r) > Wants::Nothing).collect();
        let for_logits: Vec<u32> =
            (0..kept.len() as u32).filter(|&i| wants(kept[i as usize]) == Wants::Logits).collect();
        batch.kept_for_logits = (for_logits.len() < kept.len()).then_some(for_logits);
        batch.kept = kept;
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

    /// Indices of the rows that remain after the last layer's attention, ascending.
    pub fn kept(&self) -> &[u32] {
        &self.kept
    }

    /// Indices into [`kept`](Self::kept) of the rows that want logits, ascending; `None` where all of them do.
    pub fn kept_for_logits(&self) -> Option<&[u32]> {
        self.kept_for_logits.as_deref()
    }

    /// Rows that want logits.
    pub fn n_logits(&self) -> usize {
        self.kept_for_logits.as_ref().map_or(self.kept.len(), Vec::len)
    }

    /// The absolute positions of a stage's rows, of which there are `n_rows`: all, those that are kept, or those that want logits.
    pub fn positions_of(&self, n_rows: usize) -> impl ExactSizeIterator<Item = u32> {
        (0..n_rows).map(move |i| self.row_of(i, n_rows).position)
    }

    /// The `i`-th row of a stage that has `n_rows`.
    fn row_of(&self, i: usize, n_rows: usize) -> &Row {
        let kept = |i: usize| &self.rows[self.kept[i] as usize];
        match &self.kept_for_logits {
            _ if n_rows == self.rows.len() => &self.rows[i],
            _ if n_rows == self.kept.len() => kept(i),
            Some(rows) if n_rows == rows.len() => kept(rows[i] as usize),
            _ => panic!("a stage has all rows, those kept or those that want logits, not {n_rows}"),
        }
    }

    /// Which of a stage's `n_rows` rows are those of sequence `s`.
    pub fn rows_of(&self, s: u32, n_rows: usize) -> Range<usize> {
        let (mut first, mut n) = (None, 0);
        for i in 0..n_rows {
            if self.row_of(i, n_rows).sequence == s {
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
