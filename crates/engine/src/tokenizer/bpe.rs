//! Byte-pair merging of one word in O(n log n), whatever the word and the merges are.
//!
//! A word is an array with one cell per byte. A symbol (a token in the making) covers as many cells as it has bytes
//! and writes its id into its first and its last one, so that both neighbours of a symbol are found from its place
//! and its length: no links, four bytes of memory per byte of text. Pairs that can merge wait in a queue, lowest rank
//! first and leftmost first within a rank, which is the order of the merges in Hugging Face `tokenizers`.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// Set in the cell where a symbol starts; ids are below it.
const START: u32 = 1 << 31;

/// No bucket waits for a rank.
const NO_BUCKET: u32 = u32::MAX;

/// A merge: `left` and `right`, side by side, become `result`, whose bytes are theirs joined.
#[derive(Clone, Copy, Debug)]
pub struct Merge {
    pub left: u32,
    pub right: u32,
    pub result: u32,
}

/// The byte symbols and merges of a vocabulary.
#[derive(Debug)]
pub struct Bpe {
    /// The token of each byte. Those without one share an id past the vocabulary, which nothing merges.
    byte_ids: [u32; 256],
    /// Bytes in each token, and 1 for the id past the vocabulary.
    lens: Vec<u32>,
    /// By rank.
    merges: Vec<Merge>,
    /// The rank of the merge of a left and a right id.
    ranks: HashMap<(u32, u32), u32>,
    /// What is put out for a byte without a token.
    unk: Option<u32>,
}

/// Memory that the words of one text share.
#[derive(Debug)]
pub struct Workspace {
    cells: Vec<u32>,
    queue: RankQueue,
}

impl Bpe {
    /// `lens` has the length in bytes of each token of the vocabulary, `merges` are in order of rank (of two for the
    /// same pair the later counts), `byte_ids` gives the token of each byte. `unk` must be there if one is missing.
    pub fn new(mut lens: Vec<u32>, byte_ids: [Option<u32>; 256], merges: Vec<Merge>, unk: Option<u32>) -> Bpe {
        let missing = lens.len() as u32;
        assert!(missing < START, "a vocabulary has fewer than 2^31 tokens");
        assert!(unk.is_some() || byte_ids.iter().all(Option::is_some), "a byte without a token needs an unknown token");
        lens.push(1);
        let ranks = merges.iter().zip(0..).map(|(merge, rank)| ((merge.left, merge.right), rank)).collect();
        Bpe { byte_ids: byte_ids.map(|id| id.unwrap_or(missing)), lens, merges, ranks, unk }
    }

    pub fn workspace(&self) -> Workspace {
        Workspace { cells: Vec::new(), queue: RankQueue::new(self.merges.len()) }
    }

    /// Appends the tokens of `word`, which has at most 2^32 - 1 bytes, to `out`.
    pub fn encode(&self, word: &[u8], workspace: &mut Workspace, out: &mut Vec<u32>) {
        assert!(u32::try_from(word.len()).is_ok(), "a word has fewer than 2^32 bytes");
        let Workspace { cells, queue } = workspace;
        cells.clear();
        cells.extend(word.iter().map(|&byte| self.byte_ids[usize::from(byte)] | START));
        for at in 1..cells.len() {
            self.offer(queue, at - 1, cells[at - 1] & !START, cells[at] & !START);
        }
        while let Some((rank, at)) = queue.pop() {
            self.merge(cells, queue, rank, at as usize);
        }
        let mut at = 0;
        while at < cells.len() {
            let id = cells[at] & !START;
            at += self.len(id);
            let known = (id as usize) < self.lens.len() - 1;
            out.push(if known { id } else { self.unk.expect("checked at construction") });
        }
    }

    /// Does the merge of a rank at a place if the two symbols are still there, and offers the result's new pairs.
    fn merge(&self, cells: &mut [u32], queue: &mut RankQueue, rank: u32, at: usize) {
        let Merge { left, right, result } = self.merges[rank as usize];
        if cells[at] != left | START {
            return;
        }
        let middle = at + self.len(left);
        if cells.get(middle) != Some(&(right | START)) {
            return;
        }
        let end = middle + self.len(right);
        cells[middle] &= !START;
        cells[end - 1] = result;
        cells[at] = result | START;
        if at > 0 {
            let before = cells[at - 1] & !START;
            self.offer(queue, at - self.len(before), before, result);
        }
        if end < cells.len() {
            self.offer(queue, at, result, cells[end] & !START);
        }
    }

    fn offer(&self, queue: &mut RankQueue, at: usize, left: u32, right: u32) {
        if let Some(&rank) = self.ranks.get(&(left, right)) {
            queue.push(rank, at as u32);
        }
    }

    fn len(&self, id: u32) -> usize {
        self.lens[id as usize] as usize
    }
}

/// A priority queue of (rank, place). One bucket per rank: a long run of one character fills a few buckets in order of
/// place, and taking from those costs nothing, where one heap over all pairs would miss the cache at every step.
#[derive(Debug)]
struct RankQueue {
    /// (rank, its bucket), one for each rank that has a bucket.
    order: BinaryHeap<Reverse<(u32, u32)>>,
    bucket_of_rank: Vec<u32>,
    buckets: Vec<Bucket>,
    /// Empty buckets to use again.
    free: Vec<u32>,
}

#[derive(Debug, Default)]
struct Bucket {
    /// Places pushed before the first was taken; sorted when the first is taken.
    places: Vec<u32>,
    taken: usize,
    open: bool,
    /// Places pushed after the first was taken.
    late: BinaryHeap<Reverse<u32>>,
}

impl RankQueue {
    fn new(n_ranks: usize) -> RankQueue {
        RankQueue {
            order: BinaryHeap::new(),
            bucket_of_rank: vec![NO_BUCKET; n_ranks],
            buckets: Vec::new(),
            free: Vec::new(),
        }
    }

    fn push(&mut self, rank: u32, place: u32) {
        let slot = &mut self.bucket_of_rank[rank as usize];
        if *slot == NO_BUCKET {
            *slot = self.free.pop().unwrap_or_else(|| {
                self.buckets.push(Bucket::default());
                self.buckets.len() as u32 - 1
            });
            self.order.push(Reverse((rank, *slot)));
        }
        self.buckets[*slot as usize].push(place);
    }

    fn pop(&mut self) -> Option<(u32, u32)> {
        while let Some(&Reverse((rank, slot))) = self.order.peek() {
            if let Some(place) = self.buckets[slot as usize].pop() {
                return Some((rank, place));
            }
            self.order.pop();
            self.bucket_of_rank[rank as usize] = NO_BUCKET;
            self.buckets[slot as usize].close();
            self.free.push(slot);
        }
        None
    }
}

impl Bucket {
    /// Places that a bucket keeps memory for while it is empty.
    const KEEP: usize = 1024;

    fn push(&mut self, place: u32) {
        if self.open { self.late.push(Reverse(place)) } else { self.places.push(place) }
    }

    fn pop(&mut self) -> Option<u32> {
        if !self.open {
            self.open = true;
            // A stable sort, because it takes linear time where the places come in order or in a few ordered runs.
            self.places.sort();
        }
        let next = self.places.get(self.taken).copied();
        match self.late.peek() {
            Some(&Reverse(late)) if next.is_none_or(|next| late < next) => self.late.pop().map(|Reverse(late)| late),
            _ => {
                self.taken += usize::from(next.is_some());
                next
            }
        }
    }

    fn close(&mut self) {
        self.places.clear();
        self.places.shrink_to(Self::KEEP);
        self.late.shrink_to(Self::KEEP);
        self.taken = 0;
        self.open = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Tokens 0..=2 are the bytes a, b and c; further ones come from merges of earlier ones, given in order of rank.
    fn bpe(merges: &[(u32, u32)]) -> Bpe {
        let mut texts: Vec<String> = ["a", "b", "c"].map(String::from).to_vec();
        let mut full = Vec::new();
        for &(left, right) in merges {
            let (left, right) = (left % texts.len() as u32, right % texts.len() as u32);
            let text = format!("{}{}", texts[left as usize], texts[right as usize]);
            let result = texts.iter().position(|t| *t == text).unwrap_or_else(|| {
                texts.push(text);
                texts.len() - 1
            });
            full.push(Merge { left, right, result: result as u32 });
        }
        // Ranks need not grow with the length of the result.
        full.reverse();
        let mut byte_ids = [None; 256];
        (0..3).for_each(|id| byte_ids[usize::from(b'a' + id)] = Some(u32::from(id)));
        let lens = texts.iter().map(|text| text.len() as u32).collect();
        Bpe::new(lens, byte_ids, full, Some(0))
    }

    /// The definition: while there is a pair with a rank, merge the leftmost pair of the lowest rank.
    fn plain(bpe: &Bpe, word: &[u8]) -> Vec<u32> {
        let mut ids: Vec<u32> = word.iter().map(|&byte| bpe.byte_ids[usize::from(byte)]).collect();
        while let Some((rank, at)) =
            (1..ids.len()).filter_map(|at| Some((*bpe.ranks.get(&(ids[at - 1], ids[at]))?, at))).min()
        {
            ids[at - 1] = bpe.merges[rank as usize].result;
            ids.remove(at);
        }
        ids
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn equals_the_definition(
            merges in prop::collection::vec((0u32..12, 0u32..12), 0..12),
            words in prop::collection::vec("[abc]{0,40}|a{0,40}|(ab){0,20}", 1..4),
        ) {
            let bpe = bpe(&merges);
            let mut workspace = bpe.workspace();
            for word in words {
                let mut ids = Vec::new();
                bpe.encode(word.as_bytes(), &mut workspace, &mut ids);
                prop_assert_eq!(ids, plain(&bpe, word.as_bytes()));
            }
        }
    }

    #[test]
    fn a_byte_without_a_token_is_unknown_and_merges_with_nothing() {
        let bpe = bpe(&[(0, 1), (0, 0)]);
        let mut ids = Vec::new();
        bpe.encode(b"abzab", &mut bpe.workspace(), &mut ids);
        assert_eq!(ids, [3, 0, 3]);
    }
}
