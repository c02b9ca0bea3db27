//! `/metrics`: the text is what scrapers read, and the numbers are those of requests that are known.

use std::collections::BTreeMap;

use crate::support::*;
use apr_server::{Server, Settings};
use serde_json::json;

const TEXT: &str = "/v1/completions";

/// Types by name, and values by name and labels, read as Prometheus' text form says.
struct Scrape {
    types: BTreeMap<String, String>,
    values: BTreeMap<String, f64>,
}

impl Scrape {
    #[track_caller]
    fn of(server: &Server) -> Scrape {
        let reply = get(server, "/metrics");
        assert_eq!((reply.status, reply.header("content-type")), (200, Some("text/plain; version=0.0.4")));
        let mut scrape = Scrape { types: BTreeMap::new(), values: BTreeMap::new() };
        for line in reply.text().lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(scrape.types.insert(name.into(), kind.into()), None, "{name} has one type");
            } else if !line.starts_with("# HELP ") {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let family = series.split('{').next().unwrap();
                let part = ["_bucket", "_sum", "_count"].iter().find_map(|end| family.strip_suffix(end));
                let is_known = |name: &str| scrape.types.contains_key(name);
                assert!(is_known(family) || part.is_some_and(is_known), "{line} comes after its type");
                assert_eq!(scrape.values.insert(series.into(), value.parse().unwrap()), None, "{series} is there once");
            }
        }
        scrape
    }

    /// A measure with this label, or of the model where there is none.
    #[track_caller]
    fn value(&self, name: &str, label: &str) -> f64 {
        let is_it = |series: &str| {
            let (family, labels) = series.split_once('{').unwrap_or((series, "}"));
            family == name && (label.is_empty() || labels.contains(label))
        };
        let mut found = self.values.iter().filter(|(series, _)| is_it(series));
        let (series, value) = found.next().unwrap_or_else(|| panic!("there is no {name} {label}"));
        assert!(!name.starts_with("vllm:") || series.contains(r#"engine="0""#), "{series}");
        assert!(!name.starts_with("vllm:") || series.contains(r#"model_name="tiny-qwen3moe""#), "{series}");
        assert_eq!(found.next(), None, "{name} {label} is one");
        *value
    }
}

#[test]
fn counts_are_those_of_the_requests() {
    let server = start();
    let request = json!({"prompt": vec![9; 100], "max_tokens": 6, "ignore_eos": true});
    (0..2).for_each(|_| _ = ok(&server, TEXT, &request));
    assert_eq!(post(&server, TEXT, &json!({})).status, 400);
    soon("nothing is going on", || Scrape::of(&server).value("vllm:num_requests_running", "") == 0.0);
    let now = Scrape::of(&server);
    for (name, label, expected) in [
        ("vllm:num_requests_waiting", "", 0.0),
        ("vllm:kv_cache_usage_perc", "", 0.0),
        ("vllm:prompt_tokens_total", "", 200.0),
        ("vllm:generation_tokens_total", "", 12.0),
        ("vllm:prefix_cache_queries_total", "", 200.0),
        ("vllm:request_success_total", r#"finished_reason="length""#, 2.0),
        ("vllm:request_success_total", r#"finished_reason="stop""#, 0.0),
        ("vllm:time_to_first_token_seconds_count", "", 2.0),
        ("vllm:inter_token_latency_seconds_count", "", 10.0),
        ("vllm:e2e_request_latency_seconds_count", "", 2.0),
        ("vllm:request_queue_time_seconds_count", "", 2.0),
        ("vllm:request_prefill_time_seconds_count", "", 2.0),
        ("vllm:request_decode_time_seconds_count", "", 2.0),
        ("vllm:request_prompt_tokens_sum", "", 200.0),
        ("vllm:request_generation_tokens_sum", "", 12.0),
        ("vllm:request_prompt_tokens_bucket", r#"le="100""#, 2.0),
        ("vllm:request_prompt_tokens_bucket", r#"le="50""#, 0.0),
        ("apr_generation_tokens_total", "", 12.0),
        ("apr_http_responses_total", r#"code="400""#, 1.0),
        ("apr_requests_cancelled_total", r#"phase="decode""#, 0.0),
        ("apr_numerical_errors_total", "", 0.0),
    ] {
        assert_eq!(now.value(name, label), expected, "{name} {label}");
    }
    let hits = now.value("vllm:prefix_cache_hits_total", "");
    assert!(hits > 0.0 && hits < 100.0, "{hits} tokens of the second prompt were there");
    let phases = ["request_queue", "request_prefill", "request_decode"];
    let parts: f64 = phases.iter().map(|p| now.value(&format!("vllm:{p}_time_seconds_sum"), "")).sum();
    let whole = now.value("vllm:e2e_request_latency_seconds_sum", "");
    assert!((parts - whole).abs() < 1e-6, "{parts} s in phases, {whole} s as a whole");
    assert!(now.value("apr_prefill_tokens_per_second", "") > 0.0);
    assert!(now.value("process_resident_memory_bytes", "") > 1e6);
    assert_eq!(now.value("vllm:cache_config_info", r#"enable_prefix_caching="True""#), 1.0);
    for (name, kind) in [
        ("vllm:num_requests_running", "gauge"),
        ("vllm:prompt_tokens_total", "counter"),
        ("apr_time_to_first_token_seconds", "histogram"),
    ] {
        assert_eq!(now.types.get(name).map(String::as_str), Some(kind), "{name}");
    }
}

#[test]
fn who_leaves_and_who_is_refused_are_counted() {
    let server = start_with(Settings::default(), |limits| (limits.n_parallel, limits.n_queue) = (1, 1));
    let count = |name: &str, label: &str| Scrape::of(&server).value(name, label);
    let body = json!({"prompt": "go on", "max_tokens": 900, "ignore_eos": true, "stream": true, "temperature": 1});
    let body = body.to_string();
    let mut clients: Vec<Client> = (0..2).map(|_| Client::connect(server.addr())).collect();
    for client in &mut clients {
        client.request("POST", TEXT, &[], body.as_bytes());
        assert_eq!(client.head().0, 200);
    }
    soon("one is answered", || count("vllm:generation_tokens_total", "") > 0.0);
    soon("one waits", || count("vllm:num_requests_waiting", "") == 1.0);
    assert_eq!(count("vllm:num_requests_running", ""), 1.0);
    assert!(count("vllm:kv_cache_usage_perc", "") > 0.0);
    assert_eq!(post_bytes(server.addr(), TEXT, body.as_bytes()).status, 429);
    assert_eq!(count("apr_requests_refused_total", ""), 1.0);
    drop(clients.pop());
    let cancelled = |phase: &str| count("apr_requests_cancelled_total", &format!("phase={phase:?}"));
    soon("who waited is counted", || cancelled("queued") == 1.0);
    drop(clients);
    soon("who was answered is counted", || cancelled("decode") == 1.0);
    assert_eq!(cancelled("prefill"), 0.0);
    assert_eq!(count("vllm:request_success_total", r#"finished_reason="abort""#), 2.0);
    soon("nothing is going on", || count("vllm:num_requests_running", "") == 0.0);
}
