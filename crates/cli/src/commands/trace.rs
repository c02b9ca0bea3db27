//! `apr trace`: what a model computes, stage by stage, from its metadata or while a prompt runs through it.

use std::path::{Path, PathBuf};

use apr_engine::Engine;
use apr_engine::model_file::ModelFile;
use apr_engine::stage::{Place, Stage};
use apr_engine::trace::file::TraceHeader;
use apr_engine::trace::{SaveRequest, TraceRequest, header_of, trace};
use serde_json::json;

use self::select::{Positions, Span, StageNames};
use crate::failure::{Done, FAILED, Failure, Result, usage};
use crate::options::{LoadArgs, TokenList, model_name, token_list};
use crate::print::{bytes, one_line, say};

mod meta;
mod page;
mod report;
mod select;
mod text;

/// The prompt of a trace that is given none.
const PROMPT: &str = "What is 2+2?";
/// Hashing a model larger than this takes long enough to be said.
const HASH_SAID: u64 = 1_000_000_000;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    load: LoadArgs,
    /// Run the forward pass; without it the model's stages and shapes are shown from metadata. Implied by --prompt, --tokens, --chat,
    /// --decode, --positions, --save-tensor and --html
    #[arg(long)]
    payload: bool,
    /// Text to run, without the chat template [default: "What is 2+2?"]
    #[arg(long, short = 'p', value_name = "TEXT", allow_hyphen_values = true, conflicts_with_all = ["tokens", "chat"])]
    prompt: Option<String>,
    /// Token ids to run, as in 1,2,3
    #[arg(long, value_name = "IDS", value_parser = token_list, conflicts_with = "chat")]
    tokens: Option<TokenList>,
    /// A user's message to run, through the chat template
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    chat: Option<String>,
    /// Decode N tokens after the prompt, the most likely ones, and trace each step
    #[arg(long, value_name = "N")]
    decode: Option<usize>,
    /// Positions of the prompt to look at: last, all, or A..B, from 0 and without B [default: last for statistics, all for saved
    /// tensors and for a page]
    #[arg(long, value_name = "last|all|A..B")]
    positions: Option<Positions>,
    /// Run the plain bodies of fused ops, so that the stages inside them are seen
    #[arg(long)]
    unfused: bool,
    /// Save the values of stages, as in moe_router,moe_ffn_out, or all; may be given several times
    #[arg(long, value_name = "STAGES")]
    save_tensor: Vec<StageNames>,
    /// Layers to save, as in 0..48, from 0 and without the last [default: all]
    #[arg(long, value_name = "A..B", requires = "save_tensor")]
    save_tensor_layers: Option<Span>,
    /// Folder to write trace.safetensors to [default: the model's name with -trace, in the current folder]
    #[arg(long, value_name = "DIR", requires = "save_tensor")]
    save_tensor_dir: Option<PathBuf>,
    /// Write a page that shows everything
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Args {
    /// Whether the forward pass is to be run.
    fn runs(&self) -> bool {
        let given = [self.prompt.is_some(), self.tokens.is_some(), self.chat.is_some(), self.decode.is_some()];
        let wanted = [self.positions.is_some(), !self.save_tensor.is_empty(), self.html.is_some()];
        self.payload || given.contains(&true) || wanted.contains(&true)
    }
}

pub fn run(args: Args) -> Result<Done> {
    if !args.runs() {
        if args.load.gpu {
            apr_engine::device::info(args.load.device())?;
        }
        if args.unfused {
            say("note: --unfused acts on a pass; add --payload to run one");
        }
        return meta::run(&args.load.model, args.json);
    }
    let mut engine = args.load.load()?;
    let prompt = prompt_tokens(&engine, &args)?;
    let n = prompt.len();
    let n_decode = args.decode.unwrap_or(0);
    let default = if args.html.is_some() { Positions::All } else { Positions::Last };
    let request = TraceRequest {
        positions: args.positions.as_ref().unwrap_or(&default).within(n)?,
        n_decode,
        unfused: args.unfused,
        detailed: args.html.is_some(),
        save: save_request(&engine, &args, n)?,
        prompt,
    };
    let traced = trace(&mut engine, &request)?;
    if let (Some(path), Some(save)) = (&traced.saved, &request.save) {
        let size = std::fs::metadata(path)?.len();
        let n_positions = save.positions.len() + n_decode;
        let (n_tensors, path) = (save.places.len(), path.display());
        say(format_args!("saved {n_tensors} tensors of {n_positions} positions, {}, to {path}", bytes(size)));
    }
    let view = report::View { engine: &engine, request: &request, traced: &traced, path: &args.load.model };
    if let Some(path) = &args.html {
        let n_threads = args.load.threads.unwrap_or_else(apr_engine::device::default_threads);
        std::fs::write(path, crate::page::trace_page(&page::data(&view, n_threads))).map_err(|e| cannot(path, e))?;
        say(format_args!("wrote {}", path.display()));
    }
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if args.json {
        std::io::Write::write_all(&mut out, format!("{}\n", one_line(&report::json(&view))).as_bytes())?;
    } else {
        text::write(&mut out, &view)?;
    }
    std::io::Write::flush(&mut out)?;
    Ok(Done::Ok)
}

fn prompt_tokens(engine: &Engine, args: &Args) -> Result<Vec<u32>> {
    if let Some(tokens) = &args.tokens {
        return Ok(tokens.clone());
    }
    if let Some(text) = &args.chat {
        if text.is_empty() {
            return Err(usage("the prompt is empty: there is nothing to answer"));
        }
        let messages = vec![json!({"role": "user", "content": text})];
        return Ok(engine.chat_tokens(&engine.chat_input(messages))?);
    }
    let text = args.prompt.as_deref().unwrap_or_else(|| {
        say(format_args!("note: no prompt is given; tracing {PROMPT:?}"));
        PROMPT
    });
    Ok(engine.text_tokens(text.as_bytes(), false))
}

fn save_request(engine: &Engine, args: &Args, n_prompt: usize) -> Result<Option<SaveRequest>> {
    if args.save_tensor.is_empty() {
        return Ok(None);
    }
    let stages = select::stages(&args.save_tensor, engine, args.unfused)?;
    let n_layer = engine.hparams.n_layer;
    let layers = match &args.save_tensor_layers {
        Some(span) => span.within(n_layer, "--save-tensor-layers", "layers")?,
        None => 0..n_layer,
    };
    let of_layers = |stage: Stage| match stage.is_global() {
        true => vec![Place::new(0, stage)],
        false => layers.clone().map(|layer| Place::new(layer, stage)).collect(),
    };
    let places = stages.into_iter().flat_map(of_layers).collect();
    let positions = args.positions.as_ref().unwrap_or(&Positions::All).within(n_prompt)?;
    let default = || PathBuf::from(format!("{}-trace", model_name(&args.load.model)));
    let dir = args.save_tensor_dir.clone().unwrap_or_else(default);
    std::fs::create_dir_all(&dir).map_err(|e| cannot(&dir, e))?;
    let header = TraceHeader { model_sha256: sha256(&engine.file), ..header_of(engine) };
    Ok(Some(SaveRequest { path: dir.join("trace.safetensors"), places, positions, header }))
}

fn sha256(file: &ModelFile) -> String {
    if file.file_bytes > HASH_SAID {
        say(format_args!("note: hashing {} of model, to name it in the trace", bytes(file.file_bytes)));
    }
    file.sha256()
}

/// A file or folder that cannot be written.
fn cannot(path: &Path, e: std::io::Error) -> Failure {
    Failure { code: FAILED, error: anyhow::anyhow!("{}: {e}", path.display()) }
}
