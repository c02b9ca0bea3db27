//! Holds the table of faults that `apr diff` is held to: each edit changes what the table says and no more, and on the reference
//! backend it shows where the table says.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use apr_core::backend::fed::{Fed, Feed, Feeding};
use apr_core::backend::reference::Reference;
use apr_core::backend::{Backend, KvShape, KvType, Result};
use apr_core::batch::{Batch, Row, Wants};
use apr_core::gguf;
use apr_core::hparams::Hparams;
use apr_core::models;
use apr_core::probe::{Recorder, Recording};
use apr_core::stage::Stage;

#[path = "support/apr.rs"]
mod apr;
#[path = "support/edit.rs"]
mod edit;
#[path = "support/faults.rs"]
mod faults;
#[path = "../../core/tests/support/gguf_writer.rs"]
mod gguf_writer;
#[path = "support/model.rs"]
mod model;

use apr::fixture;
use faults::{Fault, Place};
use model::{Model, Tensor};

/// What a pass showed, by layer and stage.
type Seen = BTreeMap<(usize, Stage), Recording>;

#[track_caller]
fn none(mismatches: Vec<String>) {
    assert!(mismatches.is_empty(), "{} mismatches\n  {}", mismatches.len(), mismatches.join("\n  "));
}

/// The fixtures of the table, taken apart.
fn fixtures() -> BTreeMap<&'static str, Model> {
    faults::all().iter().map(|f| (f.fixture, Model::read(&fixture(f.fixture)))).collect()
}

fn edited(fault: &Fault, good: &Model) -> Model {
    let mut bad = good.clone();
    (fault.edit)(&mut bad);
    bad
}

#[test]
fn names_tell_faults_apart() {
    let all = faults::all();
    let names: BTreeSet<_> = all.iter().map(|f| f.name).collect();
    assert_eq!(names.len(), all.len());
}

#[test]
fn a_file_that_is_written_again_is_the_same_model() {
    for (name, model) in fixtures() {
        let (old, new) = (std::fs::read(fixture(name)).unwrap(), model.bytes());
        let (a, b) = (gguf::parse(&old).unwrap(), gguf::parse(&new).unwrap());
        assert_eq!((&a.metadata, a.version), (&b.metadata, b.version), "{name}");
        assert_eq!(a.tensors.len(), b.tensors.len(), "{name}");
        for (a, b) in a.tensors.iter().zip(&b.tensors) {
            assert_eq!((&a.name, a.qtype, &a.ne), (&b.name, b.qtype, &b.ne), "{name}");
            let data = |t: &gguf::TensorInfo, file: &[u8]| file[t.offset as usize..][..t.n_bytes as usize].to_vec();
            assert_eq!(data(a, &old), data(b, &new), "{name}: {}", a.name);
        }
    }
}

#[test]
fn edits_change_what_the_table_says_and_nothing_else() {
    let fixtures = fixtures();
    let changes = |f: &Fault| {
        let good = &fixtures[f.fixture];
        let bad = edited(f, good);
        let keys = |m: &Model| m.metadata.iter().map(|(k, v)| (k.clone(), format!("{v:?}"))).collect::<BTreeSet<_>>();
        let changed: BTreeSet<String> =
            keys(good).symmetric_difference(&keys(&bad)).map(|(key, _)| key.clone()).collect();
        let mut out = Vec::new();
        if !changed.iter().map(String::as_str).eq(BTreeSet::from_iter(f.keys.iter().copied())) {
            out.push(format!("{}: keys {changed:?}, the table says {:?}", f.name, f.keys));
        }
        let places = || [&f.first].into_iter().chain(&f.others);
        for (a, b) in good.tensors.iter().zip(&bad.tensors) {
            let place = places().find(|p| p.tensor.as_ref() == Some(&a.name));
            out.extend(changes_of_a_tensor(a, b, place).map(|what| format!("{}: {}: {what}", f.name, a.name)));
        }
        out
    };
    none(faults::all().iter().flat_map(changes).collect());
}

/// What is wrong with the change of a tensor that is to change at `place` only.
fn changes_of_a_tensor(a: &Tensor, b: &Tensor, place: Option<&Place>) -> Option<String> {
    let same = (a.qtype, &a.ne, &a.data) == (b.qtype, &b.ne, &b.data);
    let Some(place) = place else { return (!same).then(|| "changes, which the table does not say".into()) };
    if same {
        return Some("does not change".into());
    }
    if (a.qtype, &a.ne) != (b.qtype, &b.ne) {
        return None;
    }
    let (mut experts, n) = (BTreeSet::new(), a.qtype.block_bytes());
    for i in (0..a.data.len()).filter(|&i| a.data[i] != b.data[i]) {
        let (row, block) = (i / a.row_bytes() % a.n_rows(), i % a.row_bytes() / n);
        let row = if a.ne.len() == 1 { block } else { row };
        experts.insert(i / a.row_bytes() / a.n_rows());
        let inside = place.rows.as_ref().is_none_or(|r| r.contains(&row))
            && (a.qtype.is_float() || place.blocks.as_ref().is_none_or(|r| r.contains(&block)));
        if !inside {
            return Some(format!("row {row}, block {block} changes, expected {place:?}"));
        }
    }
    let expected: BTreeSet<_> = place.experts.iter().copied().collect();
    (a.ne.len() == 3 && experts != expected).then(|| format!("experts {experts:?} change, expected {expected:?}"))
}

#[test]
fn the_reference_finds_what_the_table_says() {
    let fixtures = fixtures();
    let mut passes: BTreeMap<(&str, Vec<u32>), Seen> = BTreeMap::new();
    let mut out = Vec::new();
    for fault in faults::all() {
        let key = (fault.fixture, fault.tokens.clone());
        let good = passes.entry(key).or_insert_with(|| pass(&fixtures[fault.fixture], &fault.tokens, None));
        let bad = edited(&fault, &fixtures[fault.fixture]);
        let free = pass(&bad, &fault.tokens, None);
        let fed = (!fault.reshaped).then(|| pass(&bad, &fault.tokens, Some(good)));
        let wrong =
            first_of(&fault, &bad, good, &free).into_iter().chain(fed.and_then(|fed| others_of(&fault, good, &fed)));
        out.extend(wrong.map(|what| format!("{}: {what}", fault.name)));
    }
    none(out);
}

/// What is wrong with the first stage of a free-running pass that differs.
fn first_of(f: &Fault, bad: &Model, good: &Seen, free: &Seen) -> Option<String> {
    let found = good.iter().find(|(key, r)| free.get(key).is_none_or(|other| !same_bits(r, other)));
    let Some((&(layer, stage), a)) = found else { return f.reached.then(|| "no stage differs".into()) };
    let b = free.get(&(layer, stage))?;
    if !f.reached || place_of(layer, stage) != (f.first.stage, f.first.layer) {
        return Some(format!("found at {}, expected {:?}", stage.tensor_name(layer), f.first));
    }
    if f.reshaped {
        return (a.n_cols() == b.n_cols()).then(|| "the shape is the same".into());
    }
    let differs = |i: usize, col: usize| a.row(i)[col].to_bits() != b.row(i)[col].to_bits();
    let at: Vec<(usize, usize)> = (0..a.positions.len())
        .flat_map(|i| (0..a.n_cols()).map(move |col| (i, col)))
        .filter(|&(i, col)| differs(i, col))
        .collect();
    if f.position.is_some_and(|p| p != at[0].0) {
        return Some(format!("the first position is {}, expected {:?}", at[0].0, f.position));
    }
    let ids = good.get(&(layer, Stage::MoeRouterIndices));
    let strays = at.iter().find_map(|&(i, col)| {
        let (expert, row) = expert_and_row(f, bad, ids.map(|r| r.row(i)), (i, col), a.n_cols())?;
        let inside = expert.is_none_or(|e| f.first.experts.contains(&e))
            && f.first.rows.as_ref().is_none_or(|rows| rows.contains(&row));
        (!inside).then(|| format!("expert {expert:?}, row {row} differs, expected {:?}", f.first))
    });
    strays.or_else(|| {
        let met = |e: &usize| ids.is_some_and(|r| r.values.contains(&(*e as f32)));
        (!f.first.experts.iter().all(met)).then(|| "no token meets the expert".into())
    })
}

/// Which expert and row of the fault's tensor made column `col` of a stage; `None` where a column is made by many.
fn expert_and_row(
    f: &Fault,
    m: &Model,
    ids: Option<&[f32]>,
    (i, col): (usize, usize),
    n_cols: usize,
) -> Option<(Option<usize>, usize)> {
    let name = f.first.tensor.as_ref()?;
    let n_rows = |part: &str| {
        let name = name.replace("attn_k", part).replace("attn_v", part);
        m.tensors.iter().find(|t| t.name == name).map_or(0, |t| *t.ne.last().expect("a shape") as usize)
    };
    match f.first.stage {
        "q_post_rope" | "k_post_rope" => None,
        "embedding" => Some((None, f.tokens[i] as usize)),
        "qkv_matmul" | "qkv_bias" => {
            let start = if name.contains("attn_q") { 0 } else { n_rows("attn_q") };
            let start = if name.contains("attn_v") { start + n_rows("attn_k") } else { start };
            Some((None, col - start))
        }
        stage if stage.starts_with("moe_expert") => {
            let ids = ids.expect("a pass through experts shows their ids");
            let n = n_cols / ids.len();
            Some((Some(ids[col / n] as usize), col % n))
        }
        _ => Some((None, col)),
    }
}

/// What is wrong with the stages that differ though they are fed the good pass's values.
fn others_of(f: &Fault, good: &Seen, fed: &Seen) -> Option<String> {
    let interior = [Stage::AttnScores, Stage::AttnSoftmax];
    let differ: BTreeSet<_> = good
        .iter()
        .filter(|(key, r)| !interior.contains(&key.1) && fed.get(key).is_none_or(|other| !same_bits(r, other)))
        .map(|(&(layer, stage), _)| place_of(layer, stage))
        .collect();
    let places = [&f.first].into_iter().chain(&f.others).filter(|_| f.reached);
    let expected: BTreeSet<_> = places.map(|p| (p.stage, p.layer)).collect();
    (differ != expected).then(|| format!("isolated, {differ:?} differ, expected {expected:?}"))
}

fn place_of(layer: usize, stage: Stage) -> (&'static str, Option<usize>) {
    (stage.name(), (!stage.is_global()).then_some(layer))
}

fn same_bits(a: &Recording, b: &Recording) -> bool {
    a.values.iter().map(|v| v.to_bits()).eq(b.values.iter().map(|v| v.to_bits()))
}

/// Feeds what another pass showed.
struct Recorded<'a>(&'a Seen);

impl Feed for Recorded<'_> {
    fn begin(&mut self, _: &Batch) {}
    fn has(&self, stage: Stage, layer: usize) -> bool {
        self.0.contains_key(&(layer, stage))
    }
    fn replace(&mut self, stage: Stage, layer: usize, _: usize, values: &mut [f32]) -> Result<()> {
        values.copy_from_slice(&self.0[&(layer, stage)].values);
        Ok(())
    }
}

/// Runs the tokens through the model on the reference backend, by itself or with another pass's values.
fn pass(model: &Model, tokens: &[u32], feed: Option<&Seen>) -> Seen {
    let bytes = model.bytes();
    let parsed = gguf::parse(&bytes).expect("an edited file is a GGUF file");
    let h = Hparams::from_gguf(&parsed).expect("an edited file describes a model");
    let loaded = models::load(&Reference, &parsed, &h, &[Arc::new(bytes)]).expect("an edited file loads");
    let kv_type = KvType::F16;
    let shape = KvShape { n_layer: h.n_layer, n_head_kv: h.heads.n_head_kv, head_dim: h.heads.head_dim, kv_type };
    let mut kv = Reference.kv_cache(shape);
    Reference.kv_reserve(&mut kv, 1).expect("a block of keys and values fits");
    let row = |(i, &token): (usize, &u32)| Row { token, position: i as u32, sequence: 0, wants: Wants::Logits };
    let batch = Batch::new(tokens.iter().enumerate().map(row).collect(), vec![vec![0]]);
    let mut seen = Recorder::all();
    let done = match feed {
        None => {
            let mut state = models::state(&Reference, &h, &loaded);
            models::step(&Reference, &loaded, &mut state, &mut kv, &batch, &mut seen)
        }
        Some(good) => {
            let fed = Fed::new(&Reference, false);
            let mut state = models::state(&fed, &h, &loaded);
            let mut probe = Feeding { watch: &mut seen, feed: &mut Recorded(good) };
            models::step(&fed, &loaded, &mut state, &mut kv, &batch, &mut probe)
        }
    };
    done.expect("an edited model runs");
    seen.seen
}
