//! The self-contained HTML pages of `apr trace --html` and `apr diff --html`: a shell, a style sheet and scripts that are
//! part of the program, and the data of one run as JSON. A page asks the network for nothing and works from `file://`.
//!
//! The data holds text of strangers (token texts, metadata of a file). It is embedded so that no byte of it can end the
//! script element, the scripts enter it into the page as text only, and a content security policy forbids all loading.

use serde_json::Value;

const SHELL: &str = include_str!("../assets/page.html");
const STYLE: &str = include_str!("../assets/page.css");
const SHARED: &str = include_str!("../assets/page.js");
const CHARTS: &str = include_str!("../assets/charts.js");
const TRACE: &str = include_str!("../assets/trace.js");
const DIFF: &str = include_str!("../assets/diff.js");

/// The page of one traced pass; `data` has the shape `apr.trace-page/1`.
pub fn trace_page(data: &Value) -> String {
    page("apr trace", &[SHARED, CHARTS, TRACE], data)
}

/// The page of a comparison; `data` is what `apr diff --json` prints (`apr.diff/1`).
pub fn diff_page(data: &Value) -> String {
    page("apr diff", &[SHARED, CHARTS, DIFF], data)
}

/// Fills the shell's marks from left to right; what has been put in is not searched for marks again.
fn page(title: &str, scripts: &[&str], data: &Value) -> String {
    let data = embedded(data);
    let scripts = scripts.join("\n");
    let parts = [("{{title}}", title), ("{{style}}", STYLE), ("{{data}}", data.as_str()), ("{{scripts}}", &scripts)];
    let mut out = String::with_capacity(SHELL.len() + STYLE.len() + data.len() + scripts.len());
    let mut rest = SHELL;
    for (mark, text) in parts {
        let (before, after) = rest.split_once(mark).expect("page.html has each mark once, in this order");
        out.push_str(before);
        out.push_str(text);
        rest = after;
    }
    out.push_str(rest);
    out
}

/// JSON that means nothing to an HTML parser: `<`, `>`, `&`, the two line separators and control characters are `\uXXXX`.
/// In compact JSON all of them stand inside strings, where the escape is the same text.
fn embedded(data: &Value) -> String {
    let json = data.to_string();
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if matches!(c, '<' | '>' | '&' | '\u{2028}' | '\u{2029}') || c.is_control() {
            out.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const HOSTILE: &str = "</script><img src=x onerror=alert(1)>";

    fn data_of(page: &str) -> &str {
        let (_, rest) = page.split_once(r#"<script type="application/json" id="data">"#).unwrap();
        rest.split_once("</script>").unwrap().0
    }

    fn stat(i: usize) -> Value {
        let x = (i as f64 + 0.5).sqrt() / 3.0;
        json!({"min": -x, "max": x * 2.0, "mean": x / 100.0, "std_dev": x / 2.0, "l2": x * 999.0,
               "nan_count": 0, "inf_count": 0, "zero_count": i, "count": 4_096_000})
    }

    /// A trace of the size of a 30B model's: 48 layers, 128 experts, 25 stages a layer, 2,000 tokens, 256 positions.
    fn big_trace() -> Value {
        let layers = 0..48_usize;
        let number = |i: usize| (i as f64 + 1.0).ln() / 7.0;
        let per_layer: Vec<f64> = layers.clone().map(number).collect();
        let stages =
            |l| (0..25).map(|s| json!({"stage": format!("a_long_stage_name_{s}"), "stats": stat(l + s)})).collect();
        let stages: Vec<Vec<Value>> = layers.clone().map(stages).collect();
        let top = |n: usize| -> Vec<Value> {
            (0..n).map(|i| json!({"id": i, "text": "\u{1}token", "p": number(i), "logit": number(i)})).collect()
        };
        let rows = |n: usize| -> Vec<Vec<f64>> {
            layers.clone().map(|l| (0..n).map(|i| number(l * n + i)).collect()).collect()
        };
        let time: Vec<Value> = (0..25)
            .map(|s| json!({"stage": s.to_string(), "ms": number(s), "bytes": 1, "gb_per_s": number(s)}))
            .collect();
        json!({
            "schema": "apr.trace-page/1", "version": "0.1.0", "command": "apr trace m.gguf", "model": {"name": "m"},
            "run": {"device": "cpu", "n_prompt": 2000, "n_decode": 0}, "tokens": top(2000),
            "layers": layers.clone().map(|l| json!({"layer_idx": l, "stages": stages[l]})).collect::<Vec<_>>(),
            "embedding": stat(1), "final_norm": stat(2), "lm_head": stat(3),
            "residual": {"rms": per_layer, "attn_share": per_layer, "ffn_share": per_layer, "cosine": per_layer},
            "experts": {"n_expert": 128, "load": rows(128), "entropy": per_layer, "imbalance": per_layer},
            "margin": layers.clone().map(|_| json!({"min": 0, "p10": 0.001, "median": 0.01, "p90": 0.1})).collect::<Vec<_>>(),
            "lens": layers.clone().map(|l| json!({"layer": l, "top": top(5), "entropy": 1})).collect::<Vec<_>>(),
            "logits": {"position": 1999, "top": top(10)},
            "position_rms": {"positions": (0..256).collect::<Vec<_>>(), "rms": rows(256)},
            "time": {"total_ms": 1, "stages": time, "layers_ms": per_layer}, "anomalies": [HOSTILE],
        })
    }

    #[test]
    fn the_data_reads_back_equal() {
        let data = json!({"text": format!("{HOSTILE} {{{{scripts}}}} <!-- & \u{2028}\u{2029}\u{7f}\u{85}\0\n\"\\ \u{202e}é😀"), "n": [1, 2.5, null]});
        for page in [trace_page(&data), diff_page(&data)] {
            assert_eq!(serde_json::from_str::<Value>(data_of(&page)).unwrap(), data);
        }
    }

    #[test]
    fn text_of_strangers_stays_inside_its_element() {
        let data = json!({"tokens": [{"text": HOSTILE}], "key & <b>": "<!--<script>\u{2028}\u{85}"});
        let empty = json!({});
        for (page, plain) in [(trace_page(&data), trace_page(&empty)), (diff_page(&data), diff_page(&empty))] {
            assert!(!page.contains(HOSTILE) && !page.contains("<img"));
            assert!(!data_of(&page).contains(['<', '>', '&', '\u{2028}', '\u{85}']));
            assert_eq!(page.matches("</script").count(), plain.matches("</script").count());
        }
    }

    #[test]
    fn a_large_trace_stays_under_five_megabytes() {
        let page = trace_page(&big_trace());
        assert!(page.len() > 500_000, "the synthetic trace is as large as a real one: {} bytes", page.len());
        assert!(page.len() < 5_000_000, "{} bytes", page.len());
    }

    #[test]
    fn a_page_loads_nothing() {
        for page in [trace_page(&json!({})), diff_page(&json!({}))] {
            let page = page.replace("http://www.w3.org/2000/svg", "");
            for word in ["http:", "https:", "@import", "src=", "fetch(", "XMLHttpRequest", "import("] {
                assert!(!page.contains(word), "the page holds {word}");
            }
            assert!(page.contains("default-src 'none'"), "a policy forbids loading");
        }
    }

    #[test]
    fn scripts_enter_data_as_text_only() {
        for script in [SHARED, CHARTS, TRACE, DIFF] {
            for word in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"] {
                assert!(!script.contains(word), "a script uses {word}");
            }
            assert!(!script.contains("</script"), "a script ends its own element");
        }
    }
}
