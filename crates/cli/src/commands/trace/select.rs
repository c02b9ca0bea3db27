//! What of a pass is meant: positions, layers and stages as they are typed, held against the model and the device.

use std::collections::BTreeSet;
use std::ops::Range;
use std::str::FromStr;

use apr_engine::Engine;
use apr_engine::models;
use apr_engine::stage::{Stage, UnknownStage};

use crate::failure::{Result, usage};
use crate::print::say;

/// `A..B`: from A to before B.
#[derive(Clone, Debug, PartialEq)]
pub struct Span(Range<usize>);

/// Positions of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Positions {
    Last,
    All,
    Span(Span),
}

/// One list of stages: names, or all of them.
#[derive(Clone, Debug, PartialEq)]
pub struct StageNames(Vec<Option<Stage>>);

impl FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Span, String> {
        let ends = text.split_once("..").and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
        match ends {
            Some((a, b)) if a < b => Ok(Span(a..b)),
            Some((a, b)) => Err(format!("{a}..{b} is empty: B is not part of A..B, and must be above A")),
            None => Err("expected A..B, as in 0..48".to_string()),
        }
    }
}

impl Span {
    /// The part of it that exists. Less than was asked for is said on stderr.
    ///
    /// # Errors
    /// Nothing of it exists.
    pub fn within(&self, n: usize, option: &str, what: &str) -> Result<Range<usize>> {
        let Range { start, end } = self.0;
        if start >= n {
            return Err(usage(format!("{option} {start}..{end}: there are {n} {what}, 0..{n}")));
        }
        if end > n {
            say(format_args!("note: {option} {start}..{end} ends with the last of the {n} {what}: {start}..{n}"));
        }
        Ok(start..end.min(n))
    }
}

impl FromStr for Positions {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Positions, String> {
        match text {
            "last" => Ok(Positions::Last),
            "all" => Ok(Positions::All),
            _ => text.parse().map(Positions::Span).map_err(|e| format!("{e}; or last, or all")),
        }
    }
}

impl Positions {
    /// Those of a prompt of `n` tokens.
    ///
    /// # Errors
    /// None of them exist.
    pub fn within(&self, n: usize) -> Result<Range<u32>> {
        let range = match self {
            Positions::Last => n.saturating_sub(1)..n,
            Positions::All => 0..n,
            // An empty prompt is refused as such.
            Positions::Span(_) if n == 0 => 0..0,
            Positions::Span(span) => span.within(n, "--positions", "positions of the prompt")?,
        };
        Ok(range.start as u32..range.end as u32)
    }
}

impl FromStr for StageNames {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<StageNames, String> {
        let stage = |name: &str| match name.trim() {
            "" => Err("a name in the list is empty".to_string()),
            "all" => Ok(None),
            name => Stage::parse(name).map(Some).map_err(|e: UnknownStage| format!("{e}; or all")),
        };
        text.split(',').map(stage).collect::<std::result::Result<_, _>>().map(StageNames)
    }
}

/// The stages that are meant, in order of computation. `all` is what the device shows; the scores of attention, which grow with the
/// square of the prompt, are meant only by name.
///
/// # Errors
/// A stage that this model does not compute, or that the device keeps to itself.
pub fn stages(lists: &[StageNames], engine: &Engine, unfused: bool) -> Result<BTreeSet<Stage>> {
    let of_model = models::stages(&engine.hparams, &engine.file.gguf);
    let shown = |stage: Stage| engine.session.shows(stage, unfused);
    let mut out = BTreeSet::new();
    for name in lists.iter().flat_map(|list| &list.0) {
        match name {
            None => {
                if of_model.iter().any(|&stage| !shown(stage) && !is_score(stage)) {
                    say("note: all is what the ops as served show; --unfused shows the stages inside fused ops too");
                }
                out.extend(of_model.iter().copied().filter(|&stage| shown(stage) && !is_score(stage)));
            }
            Some(stage) if !of_model.contains(stage) => {
                let names: Vec<&str> = of_model.iter().map(|s| s.name()).collect();
                let (name, arch) = (stage.name(), engine.hparams.arch);
                return Err(usage(format!("this {arch} model has no stage '{name}'; it has: {}", names.join(", "))));
            }
            Some(stage) if !shown(*stage) => {
                let (name, device) = (stage.name(), engine.device.kind);
                let way = match is_score(*stage) {
                    true => "use --device reference",
                    false => "use --unfused, which runs the plain body of the op that it is inside of",
                };
                return Err(usage(format!("the device {device} does not show stage '{name}'; {way}")));
            }
            Some(stage) => _ = out.insert(*stage),
        }
    }
    Ok(out)
}

/// Whether a stage's size grows with the square of the prompt.
fn is_score(stage: Stage) -> bool {
    matches!(stage, Stage::AttnScores | Stage::AttnSoftmax)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_and_positions_are_read_or_refused_with_the_form_they_take() {
        assert_eq!("0..48".parse(), Ok(Span(0..48)));
        assert_eq!(" 3 .. 4 ".parse(), Ok(Span(3..4)));
        for (bad, word) in [("3..3", "empty"), ("4..3", "empty"), ("5", "A..B"), ("..5", "A..B"), ("-1..2", "A..B")] {
            assert!(bad.parse::<Span>().unwrap_err().contains(word), "{bad}");
            assert!(bad.parse::<Positions>().unwrap_err().contains("or last, or all"), "{bad}");
        }
        assert_eq!("last".parse::<Positions>().unwrap().within(7).ok(), Some(6..7));
        assert_eq!("all".parse::<Positions>().unwrap().within(7).ok(), Some(0..7));
        assert_eq!("2..5".parse::<Positions>().unwrap().within(7).ok(), Some(2..5));
        assert_eq!("2..50".parse::<Positions>().unwrap().within(7).ok(), Some(2..7));
        assert!("7..8".parse::<Positions>().unwrap().within(7).is_err());
    }

    #[test]
    fn lists_of_stages_are_read_or_refused() {
        assert_eq!(
            "moe_router, l_out,all".parse(),
            Ok(StageNames(vec![Some(Stage::MoeRouter), Some(Stage::PostFfnResidual), None]))
        );
        assert!("a,,b".parse::<StageNames>().unwrap_err().contains("unknown stage 'a'"));
        assert!("attn_norm,,attn_out".parse::<StageNames>().unwrap_err().contains("is empty"));
        assert!("".parse::<StageNames>().unwrap_err().contains("is empty"));
    }
}
