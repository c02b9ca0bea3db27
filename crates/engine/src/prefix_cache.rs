//! Keys and values that outlive their request, so that a prompt that begins like an earlier one is not computed again.
//!
//! A tree of KV blocks: every node is one block, its path from the root the tokens that the block's keys and values
//! depend on. A token's keys and values are found only where it and every token before it are equal, so what a request
//! computes does not depend on what is found. A block that is equal in its beginning only, or is not full because its request
//! ended there, is found too, as the last; whoever finds it copies it. Which block is forgotten first is decided by use: the
//! leaf that was looked up or added longest ago.

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

/// What is held of a prompt.
#[derive(Debug, PartialEq)]
pub struct Found<'a, B> {
    pub blocks: Vec<&'a B>,
    /// Tokens that are equal; those of all blocks but the last, and one of it at least.
    pub n_tokens: usize,
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

    /// The longest beginning of `tokens` that is held. Counts as a use.
    pub fn find(&mut self, tokens: &[u32]) -> Found<'_, B> {
        self.clock += 1;
        let mut path = self.path(tokens);
        let mut n_tokens = path.len() * KV_BLOCK;
        let rest = &tokens[n_tokens..];
        let children = self.children(path.last().copied()).iter();
        let nearest = children.map(|(part, &i)| (n_equal(part, rest), i)).max();
        if let Some((n, i)) = nearest.filter(|(n, _)| *n > 0) {
            path.push(i);
            n_tokens += n;
        }
        for &i in &path {
            self.node_mut(i).used = self.clock;
        }
        Found { blocks: path.into_iter().map(|i| &self.node(i).block).collect(), n_tokens }
    }

    /// The whole blocks that [`find`](Self::find) would give. No use.
    pub fn whole(&self, tokens: &[u32]) -> impl ExactSizeIterator<Item = &B> {
        self.path(tokens).into_iter().map(|i| &self.node(i).block)
    }

    /// How many of the blocks are such.
    pub fn count(&self, is_such: impl Fn(&B) -> bool) -> usize {
        self.nodes.iter().flatten().filter(|n| is_such(&n.block)).count()
    }

    /// Adds the blocks of `tokens` that are not held yet, a last one that is not full among them; `block(i)` gives the handle of
    /// the `i`-th.
    pub fn add(&mut self, tokens: &[u32], mut block: impl FnMut(usize) -> B) {
        self.clock += 1;
        let mut parent = None;
        for (i, part) in tokens.chunks(KV_BLOCK).enumerate() {
            let children = self.children(parent);
            let held = match part.len() {
                KV_BLOCK => children.get(part).copied(),
                _ => children.iter().find(|(held, _)| held.starts_with(part)).map(|(_, &child)| child),
            };
            let child = match held {
                Some(child) => child,
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

/// Tokens with which both begin.
pub(crate) fn n_equal(a: &[u32], b: &[u32]) -> usize {
    // By pieces at first, which machines compare faster than one by one.
    let pieces = a.chunks_exact(KV_BLOCK).zip(b.chunks_exact(KV_BLOCK));
    let n = pieces.take_while(|(a, b)| a == b).count() * KV_BLOCK;
    n + a[n..].iter().zip(&b[n..]).take_while(|(a, b)| a == b).count()
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

    fn found(cache: &mut PrefixCache<String>, tokens: &[u32]) -> String {
        let found = cache.find(tokens);
        let names = found.blocks.iter().map(|b| b.to_string());
        names.chain([found.n_tokens.to_string()]).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn what_follows_equal_tokens_is_found() {
        let mut cache = PrefixCache::default();
        added(&mut cache, &[1, 2, 3]);
        added(&mut cache, &[1, 4]);
        assert_eq!(cache.len(), 4);
        assert_eq!(found(&mut cache, &tokens(&[1, 2, 3, 4], 5)), "1 12 123 192");
        assert_eq!(found(&mut cache, &tokens(&[1, 4, 3], 0)), "1 14 128");
        assert_eq!(found(&mut cache, &tokens(&[2, 3], 0)), "0", "what comes before differs");
        assert_eq!(cache.whole(&tokens(&[1, 4, 3], 0)).len(), 2);
    }

    #[test]
    fn a_block_is_found_as_far_as_it_is_equal() {
        let mut cache = PrefixCache::default();
        added(&mut cache, &[1, 2]);
        let mut almost = tokens(&[1, 2], 0);
        almost[KV_BLOCK + 63] = 7;
        assert_eq!(found(&mut cache, &almost), "1 12 127");
        assert_eq!(cache.whole(&almost).len(), 1);
        assert_eq!(found(&mut cache, &tokens(&[1], 0)[..63]), "1 63");
        // One that is not full, and one beside it that is equal for longer.
        let end: Vec<u32> = tokens(&[1], 0).into_iter().chain([5; 20]).collect();
        cache.add(&end, |_| "end".to_string());
        cache.add(&end[..80], |_| panic!("what is held for longer is not held again"));
        let longer: Vec<u32> = end.iter().copied().chain([6; 20]).collect();
        assert_eq!(found(&mut cache, &longer), "1 end 84");
        cache.add(&longer, |_| "longer".to_string());
        assert_eq!(found(&mut cache, &longer), "1 longer 104");
        assert_eq!(cache.len(), 4);
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
                prop_assert_eq!(cache.whole(&tokens(&blocks, 3)).len(), want);
                prop_assert_eq!(cache.find(&tokens(&blocks, 3)).n_tokens, want * KV_BLOCK);
                prop_assert_eq!(cache.len(), paths.len());
            }
        }
    }
}
