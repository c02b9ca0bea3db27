//! `GET /metrics`: what is counted and timed, in Prometheus' text form.
//!
//! What vLLM measures too has vLLM's name, type, labels and buckets, so that routers, dashboards and load tests made for it work
//! unchanged, and the same under `apr_`. A scrape reads counters; it waits for no step.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use apr_engine::generate::{Finish, GenerateError, Generated};
use apr_engine::scheduler::{Limits, Load};
use apr_engine::shadow::ShadowCounts;
use apr_engine::{KV_BLOCK, memory};
use axum::extract::State as Shared;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TEXT_FORMAT, TextEncoder,
};

use crate::errors::ApiError;
use crate::state::State;

/// Seconds to a first token, between tokens, and of whole requests and their phases: vLLM's buckets.
const FIRST: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const BETWEEN: [f64; 19] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const REQUEST: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
/// What vLLM's names begin with.
const VLLM: &str = "vllm:";
/// Tokens of a prompt below which its time says little of the speed.
const N_TELLING: usize = 32;

/// What is counted of the process and its HTTP, whatever the model.
pub(crate) struct ServerMetrics {
    registry: Registry,
    rss: IntGauge,
    responses: IntCounterVec,
    refused: IntCounter,
}

/// What is counted of the answers of a model.
pub(crate) struct Metrics {
    registry: Registry,
    /// Held while a scrape takes over what the scheduler counts.
    scrape: Mutex<()>,
    running: IntGauge,
    waiting: IntGauge,
    kv_usage: Gauge,
    set_back: IntCounter,
    prompt_tokens: IntCounter,
    computed_tokens: IntCounter,
    generation_tokens: IntCounter,
    prefix_queries: IntCounter,
    prefix_hits: IntCounter,
    drafts: IntCounter,
    drafted: IntCounter,
    accepted: IntCounter,
    ended: IntCounterVec,
    cancelled: IntCounterVec,
    numerical_errors: IntCounter,
    prefill_rate: Gauge,
    first_token: Histogram,
    between_tokens: Histogram,
    whole: Histogram,
    queued: Histogram,
    prefill: Histogram,
    decode: Histogram,
    n_prompt: Histogram,
    n_computed: Histogram,
    n_generated: Histogram,
}

/// `GET /metrics`.
pub(crate) async fn metrics(Shared(state): Shared<Arc<State>>) -> Result<Response, ApiError> {
    let mut families = state.metrics.gather();
    if let Some(model) = state.loaded() {
        families.extend(model.metrics.gather(model.scheduler.load()));
        families.extend(model.shadow().into_iter().flat_map(of_shadow));
    }
    let text = TextEncoder::new().encode_to_string(&families);
    let text = text.map_err(|e| ApiError::engine("internal_error", format!("the metrics cannot be written: {e}")))?;
    Ok(([(header::CONTENT_TYPE, TEXT_FORMAT)], text).into_response())
}

/// What replays on the reference found.
fn of_shadow(c: ShadowCounts) -> Vec<MetricFamily> {
    let r = &Registry::new();
    for (name, help, value) in [
        ("apr_shadow_replayed_total", "Answers that were computed once more on the reference.", c.n_replayed),
        ("apr_shadow_skipped_total", "Answers whose turn it was while another was kept or replayed.", c.n_skipped),
        ("apr_shadow_failed_total", "Replays that the reference could not make.", c.n_failed),
        ("apr_shadow_positions_total", "Positions of replays that were compared.", c.n_positions),
        ("apr_shadow_disagreements_total", "Those whose most likely token differs.", c.n_disagreeing),
        ("apr_shadow_above_bound_total", "Replays that differ by more than the precision explains.", c.n_above),
    ] {
        counter(r, name, help).inc_by(value);
    }
    let mean = c.kld_sum / c.n_positions.max(1) as f64;
    for (name, help, value) in [
        ("apr_shadow_kl_divergence_mean", "Mean divergence of served next tokens from the reference, in nats.", mean),
        ("apr_shadow_kl_divergence_max", "The largest of all positions.", c.kld_max),
    ] {
        add(r, Gauge::new(name, help)).set(value);
    }
    r.gather()
}

/// Adds a measure to those that are written.
fn add<C: Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> C {
    let metric = made.expect("names and buckets are fixed and valid");
    registry.register(Box::new(metric.clone())).expect("every name is used once");
    metric
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    add(registry, IntCounter::new(name, help))
}

fn counters(registry: &Registry, name: &str, help: &str, label: &str, values: &[&str]) -> IntCounterVec {
    let counters = add(registry, IntCounterVec::new(Opts::new(name, help), &[label]));
    // Rates can be taken from the first event on only where there was a zero before it.
    values.iter().for_each(|value| counters.with_label_values(&[value]).reset());
    counters
}

fn histogram(registry: &Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    add(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
}

/// A measure that is always 1 and says what it has to say in its labels.
fn info<const N: usize>(registry: &Registry, name: &str, help: &str, labels: [(&str, String); N]) {
    let opts = labels.into_iter().fold(Opts::new(name, help), |opts, (label, value)| opts.const_label(label, value));
    add(registry, IntGauge::with_opts(opts)).set(1);
}

impl ServerMetrics {
    pub(crate) fn new() -> ServerMetrics {
        let registry = Registry::new();
        let r = &registry;
        let version = env!("CARGO_PKG_VERSION").to_string();
        let arch = std::env::consts::ARCH.to_string();
        info(r, "apr_build_info", "The program that answers.", [("version", version), ("arch", arch)]);
        let start = IntGauge::new("process_start_time_seconds", "When the server began to listen, since 1970.");
        add(r, start).set(crate::openai::now() as i64);
        let rss = "Memory that the process has, pages of the mapped model among it.";
        ServerMetrics {
            rss: add(r, IntGauge::new("process_resident_memory_bytes", rss)),
            responses: counters(r, "apr_http_responses_total", "Answers over HTTP by status.", "code", &["200", "429"]),
            refused: counter(
                r,
                "apr_requests_refused_total",
                "Requests that were told to come back later, with a 429.",
            ),
            registry,
        }
    }

    /// Counts an answer over HTTP.
    pub(crate) fn answered(&self, status: StatusCode) {
        self.responses.with_label_values(&[status.as_str()]).inc();
        if status == StatusCode::TOO_MANY_REQUESTS {
            self.refused.inc();
        }
    }

    fn gather(&self) -> Vec<MetricFamily> {
        self.rss.set(memory::rss().unwrap_or(0) as i64);
        self.registry.gather()
    }
}

impl Metrics {
    /// Metrics of a model that is called `name` and whose contexts hold `n_ctx` tokens.
    pub(crate) fn new(name: &str, n_ctx: usize, limits: &Limits) -> Metrics {
        let labels = [("model_name", name), ("engine", "0")].map(|(k, v)| (k.to_string(), v.to_string()));
        let registry = Registry::new_custom(None, Some(HashMap::from(labels))).expect("no prefix is valid");
        let r = &registry;
        let sizes = sizes(n_ctx);
        let config = [
            ("block_size", KV_BLOCK.to_string()),
            ("num_gpu_blocks", limits.n_kv_block.to_string()),
            ("enable_prefix_caching", if limits.keep_prefixes { "True" } else { "False" }.to_string()),
        ];
        info(
            r,
            "vllm:cache_config_info",
            "Blocks of keys and values: tokens of each, and how many there can be.",
            config,
        );
        let seconds = |name: &str, help: &str| histogram(r, name, help, &REQUEST);
        let set_back = "Answers that were set back because others needed their blocks.";
        let drafted = "Tokens that were guessed ahead.";
        let rate = "Tokens per second of the latest prompt that took a while.";
        let reasons = ["stop", "length", "abort", "error"];
        let left = "Answers whose client left or did not read, by how far they had come.";
        Metrics {
            scrape: Mutex::default(),
            running: add(r, IntGauge::new("vllm:num_requests_running", "Answers in the making.")),
            waiting: add(r, IntGauge::new("vllm:num_requests_waiting", "Requests that wait to begin.")),
            kv_usage: add(r, Gauge::new("vllm:kv_cache_usage_perc", "Used part of the KV blocks, from 0 to 1.")),
            set_back: counter(r, "vllm:num_preemptions_total", set_back),
            prompt_tokens: counter(r, "vllm:prompt_tokens_total", "Tokens of prompts."),
            computed_tokens: counter(r, "apr_prefill_tokens_total", "Tokens of prompts that steps computed."),
            generation_tokens: counter(r, "vllm:generation_tokens_total", "Tokens of answers."),
            prefix_queries: counter(r, "vllm:prefix_cache_queries_total", "Tokens of prompts that were looked for."),
            prefix_hits: counter(r, "vllm:prefix_cache_hits_total", "Those that were there already."),
            drafts: counter(r, "vllm:spec_decode_num_drafts_total", "Steps with tokens guessed ahead."),
            drafted: counter(r, "vllm:spec_decode_num_draft_tokens_total", drafted),
            accepted: counter(r, "vllm:spec_decode_num_accepted_tokens_total", "Those that were right."),
            ended: counters(r, "vllm:request_success_total", "Answers by why they ended.", "finished_reason", &reasons),
            cancelled: counters(r, "apr_requests_cancelled_total", left, "phase", &["queued", "prefill", "decode"]),
            numerical_errors: counter(r, "apr_numerical_errors_total", "Answers ended by logits that are no numbers."),
            prefill_rate: add(r, Gauge::new("apr_prefill_tokens_per_second", rate)),
            first_token: histogram(r, "vllm:time_to_first_token_seconds", "From request to first token.", &FIRST),
            between_tokens: histogram(r, "vllm:inter_token_latency_seconds", "From token to token.", &BETWEEN),
            whole: seconds("vllm:e2e_request_latency_seconds", "From request to end."),
            queued: seconds("vllm:request_queue_time_seconds", "From request to the first step of its prompt."),
            prefill: seconds("vllm:request_prefill_time_seconds", "From that step to the first token."),
            decode: seconds("vllm:request_decode_time_seconds", "From the first token to the end."),
            n_prompt: histogram(r, "vllm:request_prompt_tokens", "Tokens of each prompt.", &sizes),
            n_computed: histogram(
                r,
                "vllm:request_prefill_kv_computed_tokens",
                "Tokens of each prompt that were not there already.",
                &sizes,
            ),
            n_generated: histogram(r, "vllm:request_generation_tokens", "Tokens of each answer.", &sizes),
            registry,
        }
    }

    /// Everything, what vLLM measures too under both names.
    fn gather(&self, load: Load) -> Vec<MetricFamily> {
        let _alone = self.scrape.lock().unwrap_or_else(|e| e.into_inner());
        self.running.set(load.n_running as i64);
        self.waiting.set(load.n_waiting as i64);
        let n_used = load.n_kv_block_used.saturating_sub(load.n_kv_block_idle);
        self.kv_usage.set(n_used as f64 / load.n_kv_block.max(1) as f64);
        for (counter, so_far) in [
            (&self.set_back, load.n_set_back),
            (&self.computed_tokens, load.n_prompt_token),
            (&self.generation_tokens, load.n_generated_token),
            (&self.prefix_queries, load.n_prefix_queried),
            (&self.prefix_hits, load.n_prefix_hit),
            (&self.numerical_errors, load.n_numerical_error),
        ] {
            counter.reset();
            counter.inc_by(so_far);
        }
        let families = self.registry.gather();
        let own = |family: &MetricFamily| {
            let mut own = family.clone();
            own.set_name(format!("apr_{}", family.name().strip_prefix(VLLM)?));
            Some(own)
        };
        let twins: Vec<MetricFamily> = families.iter().filter_map(own).collect();
        families.into_iter().chain(twins).collect()
    }
}

/// Sizes as vLLM sets them apart: 1, 2, 5, 10, 20 … up to the context.
fn sizes(n_ctx: usize) -> Vec<f64> {
    let of_power = |power: u32| [1, 2, 5].map(|m| m * 10_usize.pow(power));
    (0..10).flat_map(of_power).take_while(|size| *size <= n_ctx).map(|size| size as f64).collect()
}

/// One answer, from its request to its end.
pub(crate) struct Watch {
    metrics: Arc<Metrics>,
    n_prompt: u64,
    submitted: Instant,
    /// When the newest token came.
    newest: Option<Instant>,
    has_ended: bool,
}

impl Watch {
    pub(crate) fn new(metrics: Arc<Metrics>, n_prompt: usize) -> Watch {
        Watch { metrics, n_prompt: n_prompt as u64, submitted: Instant::now(), newest: None, has_ended: false }
    }

    /// A token has come.
    pub(crate) fn token(&mut self) {
        let (m, now) = (&self.metrics, Instant::now());
        match self.newest.replace(now) {
            Some(before) => m.between_tokens.observe((now - before).as_secs_f64()),
            None => {
                m.first_token.observe((now - self.submitted).as_secs_f64());
                m.prompt_tokens.inc_by(self.n_prompt);
            }
        }
    }

    /// The answer has ended. A client that is gone did not want it any more.
    pub(crate) fn ended(&mut self, result: &Result<Generated, GenerateError>, is_gone: bool) {
        self.has_ended = true;
        let m = &self.metrics;
        let reason = match result {
            Ok(g) => {
                self.done(g);
                match g.finish {
                    Finish::Stop => "stop",
                    Finish::Length => "length",
                    Finish::Cancelled => "abort",
                }
            }
            Err(GenerateError::Stopped) => "abort",
            Err(_) => "error",
        };
        m.ended.with_label_values(&[reason]).inc();
        if reason == "abort" && is_gone {
            m.cancelled.with_label_values(&[if self.newest.is_some() { "decode" } else { "prefill" }]).inc();
        }
    }

    /// Nothing more comes. Who was never begun, or set back, is not told of an end.
    pub(crate) fn let_go(&mut self) {
        if !std::mem::replace(&mut self.has_ended, true) {
            self.metrics.ended.with_label_values(&["abort"]).inc();
            let phase = if self.newest.is_some() { "decode" } else { "queued" };
            self.metrics.cancelled.with_label_values(&[phase]).inc();
        }
    }

    /// An answer that has come as far as the first token at least, or was to have none.
    fn done(&self, g: &Generated) {
        if g.finish == Finish::Cancelled && self.newest.is_none() {
            return;
        }
        let m = &self.metrics;
        let whole = self.submitted.elapsed();
        m.whole.observe(whole.as_secs_f64());
        m.queued.observe(whole.saturating_sub(g.prefill + g.decode).as_secs_f64());
        m.prefill.observe(g.prefill.as_secs_f64());
        m.decode.observe(g.decode.as_secs_f64());
        let n_computed = g.n_prompt.saturating_sub(g.n_cached);
        m.n_prompt.observe(g.n_prompt as f64);
        m.n_computed.observe(n_computed as f64);
        m.n_generated.observe(g.tokens.len() as f64);
        if self.newest.is_none() {
            m.prompt_tokens.inc_by(self.n_prompt);
        }
        m.drafts.inc_by(g.speculation.n_step as u64);
        m.drafted.inc_by(g.speculation.n_drafted as u64);
        m.accepted.inc_by(g.speculation.n_accepted as u64);
        if n_computed >= N_TELLING && !g.prefill.is_zero() {
            m.prefill_rate.set(n_computed as f64 / g.prefill.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_far_an_answer_had_come_is_known_when_its_client_leaves() {
        let limits = Limits {
            n_parallel: 1,
            n_queue: 0,
            n_kv_block: 1,
            keep_prefixes: true,
            step_time: std::time::Duration::ZERO,
        };
        let metrics = Arc::new(Metrics::new("m", 64, &limits));
        let cancelled = |phase: &str| metrics.cancelled.with_label_values(&[phase]).get();
        let watch = || Watch::new(metrics.clone(), 5);
        watch().let_go();
        watch().ended(&Err(GenerateError::Stopped), true);
        let mut answered = watch();
        answered.token();
        answered.let_go();
        // A server that stops, and what goes wrong, are nobody's leaving.
        watch().ended(&Err(GenerateError::Stopped), false);
        watch().ended(&Err(GenerateError::EmptyPrompt), true);
        assert_eq!(["queued", "prefill", "decode"].map(cancelled), [1, 1, 1]);
        let ended = |reason: &str| metrics.ended.with_label_values(&[reason]).get();
        assert_eq!(["abort", "error", "stop"].map(ended), [4, 1, 0]);
        assert_eq!((metrics.prompt_tokens.get(), metrics.first_token.get_sample_count()), (5, 1));
    }

    #[test]
    fn sizes_are_those_of_vllm() {
        assert_eq!(sizes(100), [1., 2., 5., 10., 20., 50., 100.]);
        assert_eq!(sizes(4), [1., 2.]);
    }
}
