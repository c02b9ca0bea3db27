//! `apr run`: answers a prompt, printing as it goes. stdout carries the answer only.

use std::borrow::Cow;
use std::io::{IsTerminal, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use apr_engine::Engine;
use apr_engine::chat_template::ChatInput;
use apr_engine::generate::{Ends, Finish, Generated, Request, generate};
use apr_engine::memory;
use apr_engine::sampler::SamplerConfig;
use serde_json::{Map, Value, json};

use crate::commands::verify;
use crate::failure::{Done, Failure, INTERRUPTED, Result, usage};
use crate::options::LoadArgs;
use crate::print::{ModelOut, one_line, say};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    load: LoadArgs,
    /// The prompt; `-` reads it from standard input, as does leaving it out
    prompt: Option<String>,
    /// The prompt
    #[arg(long = "prompt", short = 'p', value_name = "PROMPT", conflicts_with = "prompt", allow_hyphen_values = true)]
    prompt_flag: Option<String>,
    /// Tokens to generate at most [default: to the end of the context]
    #[arg(long, short = 'n', visible_alias = "n-predict", value_name = "N", allow_negative_numbers = true)]
    max_tokens: Option<usize>,
    /// System message
    #[arg(long, value_name = "TEXT", conflicts_with = "raw", allow_hyphen_values = true)]
    system: Option<String>,
    /// Give the prompt to the model as it is, without the chat template
    #[arg(long)]
    raw: bool,
    /// Show control tokens in the answer; with --raw also read their text in the prompt as tokens
    #[arg(long)]
    special: bool,
    /// Let a model that can think before it answers do so, or not
    #[arg(long, value_name = "BOOL")]
    enable_thinking: Option<bool>,
    /// More arguments for the chat template, as a JSON object
    #[arg(long, value_name = "JSON")]
    chat_template_kwargs: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Strings that end the answer
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Go on after an end of turn
    #[arg(long)]
    ignore_eos: bool,
    /// Never guess tokens from the text itself; the answer is the same, and may come slower
    #[arg(long)]
    no_speculate: bool,
    /// Check the contracts on this model first, and refuse to answer where one is broken
    #[arg(long)]
    verify: bool,
    /// Print one JSON object: text, tokens, finish reason, timings
    #[arg(long)]
    json: bool,
    /// No timings and no progress on stderr
    #[arg(long, short)]
    quiet: bool,
}

/// Sampling; what is left out comes from the file, or is greedy.
#[derive(clap::Args)]
struct SamplingArgs {
    /// 0 is greedy
    #[arg(long, visible_alias = "temp", value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Choose among the K most likely tokens; 0 is all
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    top_k: Option<u32>,
    /// Choose among the most likely tokens that hold P of the probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Choose among tokens at least P times as likely as the most likely
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Divides the logits of recent tokens; 1 is off
    #[arg(long, visible_alias = "repeat-penalty", value_name = "X", allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// How many tokens are recent
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    repeat_last_n: Option<usize>,
    /// Taken from a token's logit for every time it occurred
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Taken from the logit of every token that occurred
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Same seed, same text [default: a random one]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    seed: Option<u64>,
}

impl SamplingArgs {
    fn over(&self, mut c: SamplerConfig) -> SamplerConfig {
        c.temperature = self.temperature.unwrap_or(c.temperature);
        c.top_k = self.top_k.unwrap_or(c.top_k);
        c.top_p = self.top_p.unwrap_or(c.top_p);
        c.min_p = self.min_p.unwrap_or(c.min_p);
        c.repetition_penalty = self.repetition_penalty.unwrap_or(c.repetition_penalty);
        c.repeat_last_n = self.repeat_last_n.unwrap_or(c.repeat_last_n);
        c.frequency_penalty = self.frequency_penalty.unwrap_or(c.frequency_penalty);
        c.presence_penalty = self.presence_penalty.unwrap_or(c.presence_penalty);
        c.seed = self.seed.or(c.seed);
        c
    }
}

pub fn run(args: Args) -> Result<Done> {
    let kwargs = kwargs(args.chat_template_kwargs.as_deref())?;
    let start = Instant::now();
    let mut engine = if args.quiet { args.load.load_quietly()? } else { args.load.load()? };
    let load_s = start.elapsed().as_secs_f64();
    let text = prompt_text(&args)?;
    let prompt = prompt_tokens(&engine, &args, text, kwargs)?;
    let request = Request {
        prompt,
        max_tokens: args.max_tokens,
        sampler: args.sampling.over(engine.sampling_defaults()?),
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        ends: Ends::default(),
        show_control: args.special,
        speculate: !args.no_speculate,
        constraint: None,
        n_best: None,
        n_best_of_prompt: None,
        show_progress: false,
        show_experts: false,
        trace: None,
        embed: false,
    };
    if args.verify {
        verify::or_refuse(&mut engine)?;
    }
    let (cancel, answering) = on_ctrl_c()?;
    let (mut out, mut broken, mut printed) = (ModelOut::new(), None, false);
    let mut print = |text: &str| {
        answering.store(true, Ordering::Relaxed);
        if !args.json && broken.is_none() {
            broken = out.write(text).err();
            printed = true;
            // Nobody reads the answer any more.
            cancel.fetch_or(broken.is_some(), Ordering::Relaxed);
        }
    };
    let generated = generate(&mut engine, &request, &cancel, &mut print);
    if let Some(e) = broken {
        return Err(e.into());
    }
    if generated.is_err() && printed {
        out.write("\n")?; // The message gets a line of its own.
    }
    let generated = generated?;
    if args.json {
        out.write(&format!("{}\n", one_line(&report(&engine, &generated, load_s))))?;
    } else {
        out.write("\n")?;
    }
    if !args.quiet && !args.json {
        say(summary(&generated, request.sampler.temperature > 0.0));
    }
    Ok(if generated.finish == Finish::Cancelled { Done::Interrupted } else { Done::Ok })
}

/// The prompt as it was given; standard input is read only where no prompt is given, or for `-`.
fn prompt_text(args: &Args) -> Result<Vec<u8>> {
    match args.prompt.as_ref().or(args.prompt_flag.as_ref()) {
        Some(text) if text != "-" => Ok(text.clone().into_bytes()),
        _ => {
            if std::io::stdin().is_terminal() {
                say("reading the prompt from the terminal; Ctrl-D on an empty line ends it");
            }
            let mut text = Vec::new();
            std::io::stdin().lock().read_to_end(&mut text)?;
            // What a shell appends is not part of the prompt.
            while text.last().is_some_and(|b| *b == b'\n' || *b == b'\r') {
                text.pop();
            }
            Ok(text)
        }
    }
}

fn prompt_tokens(engine: &Engine, args: &Args, text: Vec<u8>, kwargs: Map<String, Value>) -> Result<Vec<u32>> {
    let content = String::from_utf8_lossy(&text);
    if matches!(content, Cow::Owned(_)) {
        say("note: the prompt is not valid UTF-8; bytes that are no character became U+FFFD");
    }
    if args.raw {
        return Ok(engine.text_tokens(&text, args.special));
    }
    if text.is_empty() {
        return Err(usage("the prompt is empty: there is nothing to answer"));
    }
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(json!({"role": "system", "content": system}));
    }
    messages.push(json!({"role": "user", "content": content}));
    let input = ChatInput { enable_thinking: args.enable_thinking, kwargs, ..engine.chat_input(messages) };
    Ok(engine.chat_tokens(&input)?)
}

fn kwargs(text: Option<&str>) -> Result<Map<String, Value>> {
    let Some(text) = text else { return Ok(Map::new()) };
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(usage(format!("--chat-template-kwargs is {other}, expected a JSON object"))),
        Err(e) => Err(usage(format!("--chat-template-kwargs is not JSON: {e}"))),
    }
}

/// Two flags: the first is set by Ctrl-C, the second by whoever has begun to answer.
///
/// Before there is any answer, Ctrl-C ends the process at once (a prompt of thousands of tokens takes a while, and nothing is lost);
/// afterwards the answer so far is ended cleanly, unless Ctrl-C is pressed again.
fn on_ctrl_c() -> Result<(Arc<AtomicBool>, Arc<AtomicBool>)> {
    let (cancel, answering) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (set, has_begun) = (cancel.clone(), answering.clone());
    let handler = move || {
        if !has_begun.load(Ordering::Relaxed) || set.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED.into());
        }
    };
    ctrlc::set_handler(handler).map_err(|e| Failure { code: crate::failure::FAILED, error: e.into() })?;
    Ok((cancel, answering))
}

/// Tokens per second, where there were any.
fn rate(n: usize, seconds: f64) -> Option<f64> {
    (n > 0 && seconds > 0.0).then(|| n as f64 / seconds)
}

/// The line on stderr. The seed is told only where it mattered.
fn summary(g: &Generated, is_random: bool) -> String {
    let speed = |n, time: std::time::Duration| {
        rate(n, time.as_secs_f64()).map_or(String::new(), |r| format!(" ({r:.1} tok/s)"))
    };
    let bandwidth = g.decode_read_bytes.filter(|_| g.n_decode_token > 0);
    let bandwidth =
        bandwidth.map_or(String::new(), |b| format!(", {:.1} GB/s", b as f64 / g.decode.as_secs_f64() / 1e9));
    let guessed = match g.speculation {
        s if s.n_step == 0 => String::new(),
        s => format!(", {} of {} guessed in {} steps", s.n_accepted, s.n_drafted, s.n_step),
    };
    format!(
        "[prompt {} tokens{}; answer {} tokens{}{bandwidth}{guessed}; ended by {}{}]",
        g.n_prompt,
        speed(g.n_prompt, g.prefill),
        g.tokens.len(),
        speed(g.n_decode_token, g.decode),
        g.finish.name(),
        if is_random { format!("; seed {}", g.seed) } else { String::new() }
    )
}

fn report(engine: &Engine, g: &Generated, load_s: f64) -> Value {
    let decode_s = g.decode.as_secs_f64();
    let read_bytes = g.decode_read_bytes.filter(|_| g.n_decode_token > 0);
    json!({
        "schema": "apr.run/1",
        "text": g.text,
        "tokens": g.tokens,
        "finish_reason": g.finish.name(),
        "prompt_tokens": g.n_prompt,
        "completion_tokens": g.tokens.len(),
        "seed": g.seed,
        "speculation": {
            "steps": g.speculation.n_step,
            "drafted": g.speculation.n_drafted,
            "accepted": g.speculation.n_accepted,
        },
        "device": engine.device.name,
        "timings": {
            "load_s": load_s,
            "prefill_s": g.prefill.as_secs_f64(),
            "prefill_tok_per_s": rate(g.n_prompt, g.prefill.as_secs_f64()),
            "decode_s": decode_s,
            "decode_tok_per_s": rate(g.n_decode_token, decode_s),
            "read_bytes_per_token": read_bytes.map(|b| b / g.n_decode_token as u64),
            "read_gb_per_s": read_bytes.map(|b| b as f64 / decode_s / 1e9),
        },
        "memory": {"model_bytes": engine.file.file_bytes, "kv_bytes": g.kv_bytes, "peak_rss_bytes": memory::peak_rss()},
    })
}
