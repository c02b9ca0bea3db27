//! The load test: `apr run` as a process of its own, from its start to its first token, and the most memory it had.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

use apr_engine::bench::median_and_spread;
use serde_json::{Value, json};

use crate::failure::{FAILED, Failure, Result};
use crate::options::LoadArgs;
use crate::print::bytes;

/// What starting takes.
pub struct LoadTime {
    /// Median over the repetitions.
    seconds: f64,
    /// Half the distance of the quartiles.
    spread_seconds: f64,
    /// The most of all repetitions, where the system says; pages of the mapped file count.
    peak_rss_bytes: Option<u64>,
    reps: usize,
}

/// Starts `reps` processes one after the other, after one that is not counted: it brings the file into the page cache.
///
/// # Errors
/// What the process says when it fails.
pub fn measure(load: &LoadArgs, reps: usize) -> Result<LoadTime> {
    once(load)?;
    let runs = (0..reps).map(|_| once(load)).collect::<Result<Vec<_>>>()?;
    let (seconds, spread_seconds) = median_and_spread(runs.iter().map(|(seconds, _)| *seconds));
    let peak_rss_bytes = runs.iter().filter_map(|(_, peak)| *peak).max();
    Ok(LoadTime { seconds, spread_seconds, peak_rss_bytes, reps })
}

/// Seconds until the first token, which is all there is on stdout; and the process's own count of its memory.
fn once(load: &LoadArgs) -> Result<(f64, Option<u64>)> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["run", "--raw", "--max-tokens", "1", "--ignore-eos", "--temperature", "0", "--json"]);
    command.args(load.to_args()).arg("--").arg(&load.model).arg("hi");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn()?;
    let mut first = [0];
    let n_first = child.stdout.as_mut().expect("stdout is piped").read(&mut first)?;
    let seconds = start.elapsed().as_secs_f64();
    let end = child.wait_with_output()?;
    if !end.status.success() || n_first == 0 {
        let said = String::from_utf8_lossy(&end.stderr);
        let error = anyhow::anyhow!("the load test's process ended with {}: {}", end.status, said.trim());
        return Err(Failure { code: end.status.code().and_then(|c| c.try_into().ok()).unwrap_or(FAILED), error });
    }
    let report: Value = serde_json::from_slice(&[&first[..], &end.stdout].concat())
        .map_err(|e| Failure { code: FAILED, error: anyhow::anyhow!("the load test's process wrote no JSON: {e}") })?;
    Ok((seconds, report["memory"]["peak_rss_bytes"].as_u64()))
}

impl LoadTime {
    pub fn line(&self) -> String {
        let memory = self.peak_rss_bytes.map_or(String::new(), |n| format!("; peak memory {}", bytes(n)));
        let (seconds, spread) = (format!("{:.3} s", self.seconds), format!("{:.3} s", self.spread_seconds));
        format!("{:<16} {seconds:>9} {spread:>8}  from the start of a process to its first token{memory}\n", "load")
    }

    pub fn entry(&self) -> Value {
        json!({
            "test": "load", "seconds": self.seconds, "spread_seconds": self.spread_seconds, "reps": self.reps,
            "peak_rss_bytes": self.peak_rss_bytes,
        })
    }
}
