//! Keys and values that outlive their request, so that a prompt that begins like an earlier one is not computed again.
//!
//! A tree of KV blocks: every node is one full block, its path from the root the tokens that the block's keys and values
//! depend on. A block is found only where every token before it and in it is equal, so what a request computes does not
//! depend on what is found. Which block is forgotten first is decided by use: the leaf that was looked up or added longest
//! ago.

use std::collections::HashMap;

use apr_core::backend::KV_BLOCK;

/// A tree of blocks of `B`, the handle of a KV block.
#[derive(Debug)]
pub struct PrefixCache<B> {
    /// Nodes; places of forgotten ones are free to be used again.
    nodes: Vec<Option<Node<B>>>,
    free: Vec<usize>,
    roots: Children,
    /// Counts uses.
    clock: u64,
}

type Children = HashMap<Box<[u32]>, usize>;

#[derive(Debug)]
struct Node<B> {
    block: B,
    parent: Option<usize>,
    children: Children,
    used: u64,
}

impl<B> Default for PrefixCache<B> {
    fn default() -> Self {
        PrefixCache { nodes: Vec::new(), free: Vec::new(), roots: Children::new(), clock: 0 }
    }
}

impl<B> PrefixCache<B> {
    /// Blocks held.
    pub fn len(&self) -> usize {
        self.nodes.len() - self.free.len()
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The blocks of the longest beginning of `tokens` that is held, whole blocks only. Counts as a use.
    pub fn find(&mut self, tokens: &[u32]) -> Vec<&B> {
        self.clock += 1;
        let path = self.path(tokens);
        for &i in &path {
            self.node_mut(i).used = self.clock;
        }
        path.into_iter().map(|i| &self.node(i).block).collect()
    }

    /// How many blocks [`find`](Self::find) would give. No use.
    pub fn n_found(&self, tokens: &[u32]) -> usize {
        self.path(tokens).len()
    }

    /// How many of the blocks are such.
    pub fn count(&self, is_such: impl Fn(&B) -> bool) -> usize {
        self.nodes.iter().flatten().filter(|n| is_such(&n.block)).count()
    }

    /// Adds the whole blocks of `tokens` that are not held yet; `block(i)` gives the handle of the `i`-th.
    pub fn add(&mut self, tokens: &[u32], mut block: impl FnMut(usize) -> B) {
        self.clock += 1;
        let mut parent = None;
        for (i, part) in tokens.chunks_exact(KV_BLOCK).enumerate() {
            let child = match self.children(parent).get(part) {
                Some(&child) => child,
                None => self.insert(parent, part, block(i)),
            };
            self.node_mut(child).used = self.clock;
            parent = Some(child);
        }
    }

    /// Forgets the leaf that was used longest ago among those that `may_go`, and gives its handle back.
    pub fn forget_one(&mut self, mut may_go: impl FnMut(&B) -> bool) -> Option<B> {
        let leaves = self.nodes.iter().enumerate().filter_map(|(i, n)| Some((i, n.as_ref()?)));
        let leaves = leaves.filter(|(_, n)| n.children.is_empty() && may_go(&n.block));
        let (i, _) = leaves.min_by_key(|(_, n)| n.used)?;
        let node = self.nodes[i].take().expect("a leaf that was just found");
        self.free.push(i);
        let siblings = match node.parent {
            Some(parent) => &mut self.node_mut(parent).children,
            None => &mut self.roots,
        };
        siblings.retain(|_, child| *child != i);
        Some(node.block)
    }

    fn path(&self, tokens: &[u32]) -> Vec<usize> {
        let (mut path, mut children) = (Vec::new(), &self.roots);
        for part in tokens.chunks_exact(KV_BLOCK) {
            let Some(&i) = children.get(part) else { break };
            path.push(i);
            children = &self.node(i).children;
        }
        path
    }

    fn insert(&mut self, parent: Option<usize>, part: &[u32], block: B) -> usize {
        let node = Some(Node { block, parent, children: Children::new(), used: 0 });
        let i = match self.free.pop() {
            Some(i) => {
                self.nodes[i] = node;
                i
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() - 1
            }
        };
        match parent {
            Some(parent) => &mut self.node_mut(parent).children,
            None => &mut self.roots,
        }
        .insert(part.into(), i);
        i
    }

    fn children(&self, of: Option<usize>) -> &Children {
        of.map_or(&self.roots, |i| &self.node(i).children)
    }

    fn node(&self, i: usize) -> &Node<B> {
        self.nodes[i].as_ref().expect("paths lead to nodes that are held")
    }

    fn node_mut(&mut self, i: usize) -> &mut Node<B> {
        self.nodes[i].as_mut().expect("paths lead to nodes that are held")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Blocks of one repeated token each, and some tokens more.
    fn tokens(blocks: &[u32], more: usize) -> Vec<u32> {
        let whole = blocks.iter().flat_map(|&t| [t; KV_BLOCK]);
        whole.chain(std::iter::repeat_n(9, more)).collect()
    }

    fn added(cache: &mut PrefixCache<String>, blocks: &[u32]) {
        cache.add(&tokens(blocks, 0), |i| blocks[..=i].iter().map(|t| t.to_string()).collect());
    }

    #[test]
    fn only_whole_blocks_after_equal_tokens_are_found() {
        let mut cache = PrefixCache::default();
        added(&mut cache, &[1, 2, 3]);
        added(&mut cache, &[1, 4]);
        assert_eq!(cache.len(), 4);
        assert_eq!(cache.find(&tokens(&[1, 2, 3, 4], 5)), ["1", "12", "123"]);
        assert_eq!(cache.find(&tokens(&[1, 4, 3], 0)), ["1", "14"]);
        assert_eq!(cache.find(&tokens(&[2, 3], 0)), [""; 0], "what comes before differs");
        let mut almost = tokens(&[1, 2], 0);
        almost[KV_BLOCK + 63] = 7;
        assert_eq!(cache.find(&almost), ["1"]);
        assert_eq!(cache.find(&tokens(&[1], 0)[..63]), [""; 0]);
    }

    #[test]
    fn what_was_used_longest_ago_goes_first_and_never_before_what_follows_it() {
        let mut cache = PrefixCache::default();
        added(&mut cache, &[1, 2]);
        added(&mut cache, &[1, 3]);
        added(&mut cache, &[4]);
        cache.find(&tokens(&[1, 2], 0));
        let order: Vec<String> = std::iter::from_fn(|| cache.forget_one(|_| true)).collect();
        assert_eq!(order, ["13", "4", "12", "1"]);
        assert!(cache.is_empty());
        added(&mut cache, &[5, 6]);
        assert_eq!(cache.forget_one(|b| b != "56"), None, "a block with followers stays");
        assert_eq!((cache.len(), cache.nodes.len()), (2, 4), "places are used again");
    }

    proptest! {
        #[test]
        fn a_tree_finds_what_a_list_of_paths_would(ops in prop::collection::vec((prop::collection::vec(0..3u32, 1..5), 0..4u8), 1..60)) {
            let (mut cache, mut paths) = (PrefixCache::<String>::default(), std::collections::BTreeSet::<String>::new());
            for (blocks, op) in ops {
                if op == 0 {
                    let gone = cache.forget_one(|_| true);
                    prop_assert_eq!(gone.is_some(), !paths.is_empty());
                    if let Some(gone) = gone {
                        prop_assert!(!paths.iter().any(|p| p.len() > gone.len() && p.starts_with(&gone)));
                        prop_assert!(paths.remove(&gone));
                    }
                } else if op == 1 {
                    added(&mut cache, &blocks);
                    let name: String = blocks.iter().map(|t| t.to_string()).collect();
                    paths.extend((1..=name.len()).map(|n| name[..n].to_string()));
                }
                let name: String = blocks.iter().map(|t| t.to_string()).collect();
                let want = (1..=name.len()).map(|n| &name[..n]).take_while(|p| paths.contains(*p)).count();
                prop_assert_eq!(cache.n_found(&tokens(&blocks, 3)), want);
                prop_assert_eq!(cache.find(&tokens(&blocks, 3)).len(), want);
                prop_assert_eq!(cache.len(), paths.len());
            }
        }
    }
}
