//! `--fail-on`: what a comparison is to fail on.

use std::str::FromStr;

use apr_engine::diff::Report;
use apr_engine::diff::verdict::Summary;

/// A measure of a comparison held against a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Condition {
    metric: Metric,
    is_above: bool,
    limit: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Metric {
    Ratio,
    Error,
    MeanKld,
    MaxKld,
    SameTopP,
    RmsDeltaP,
    Flips,
}

const METRICS: [(&str, Metric); 7] = [
    ("ratio", Metric::Ratio),
    ("error", Metric::Error),
    ("mean_kld", Metric::MeanKld),
    ("max_kld", Metric::MaxKld),
    ("same_top_p", Metric::SameTopP),
    ("rms_delta_p", Metric::RmsDeltaP),
    ("flips", Metric::Flips),
];

impl FromStr for Condition {
    type Err = String;

    fn from_str(text: &str) -> Result<Condition, String> {
        let names = || METRICS.map(|(name, _)| name).join(", ");
        let wrong =
            || format!("'{text}' is no condition; expected METRIC>NUMBER or METRIC<NUMBER, METRIC one of {}", names());
        let at = text.find(['>', '<']).ok_or_else(wrong)?;
        let (name, limit) = (text[..at].trim(), text[at + 1..].trim());
        let metric = METRICS.iter().find(|(known, _)| *known == name).ok_or_else(wrong)?.1;
        let limit: f64 = limit.parse().ok().filter(|x: &f64| x.is_finite()).ok_or_else(wrong)?;
        Ok(Condition { metric, is_above: &text[at..=at] == ">", limit })
    }
}

impl Condition {
    /// Whether a comparison meets the condition. What is not a number meets every condition: it must not pass for good.
    pub fn holds(&self, report: &Report) -> bool {
        let value = self.metric.of(report);
        value.is_some_and(|v| v.is_nan() || if self.is_above { v > self.limit } else { v < self.limit })
    }
}

impl Metric {
    fn of(self, report: &Report) -> Option<f64> {
        let largest = |f: &dyn Fn(&Summary) -> f64| {
            let judged = report.places.iter().filter_map(|p| if report.isolated { p.isolated } else { p.free });
            judged.map(|s| f(&s)).max_by(f64::total_cmp)
        };
        match self {
            Metric::Ratio => largest(&|s| s.ratio),
            Metric::Error => largest(&|s| s.error),
            Metric::MeanKld => report.end.map(|e| e.mean_kld),
            Metric::MaxKld => report.end.map(|e| e.max_kld),
            Metric::SameTopP => report.end.map(|e| e.same_top_p),
            Metric::RmsDeltaP => report.end.map(|e| e.rms_delta_p),
            Metric::Flips => Some(report.flips.len() as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_read_and_others_refused_with_the_metrics() {
        let c: Condition = "mean_kld > 0.01".parse().unwrap();
        assert_eq!(c, Condition { metric: Metric::MeanKld, is_above: true, limit: 0.01 });
        assert!(!"same_top_p<99".parse::<Condition>().unwrap().is_above);
        for bad in ["ratio", "ratio=3", "kld>1", "ratio>x", "ratio>inf", ">3"] {
            let message = bad.parse::<Condition>().unwrap_err();
            assert!(message.contains(bad) && message.contains("rms_delta_p"), "{message}");
        }
    }
}
