//! Findings of checks become results of contracts.

use super::stages::Tally;
use super::{At, CONTRACTS, CheckResult, Measure, Outcome};

/// What a check found.
pub struct Finding {
    pub sampled: String,
    pub measure: Measure,
    pub at: Option<At>,
}

/// Gives results their contracts and hands them on.
pub struct Reporter<'a> {
    report: &'a mut dyn FnMut(CheckResult),
}

impl<'a> Reporter<'a> {
    pub fn new(report: &'a mut dyn FnMut(CheckResult)) -> Reporter<'a> {
        Reporter { report }
    }

    fn send(&mut self, id: &str, outcome: Outcome, sampled: String, measure: Option<Measure>, at: Option<At>) {
        let contract = CONTRACTS.iter().find(|c| c.id == id).expect("a contract of the table");
        (self.report)(CheckResult { contract, outcome, sampled, measure, at });
    }

    pub fn found(&mut self, id: &str, finding: Finding) {
        let Finding { sampled, measure, at } = finding;
        // A measure that is not a number is within no bound.
        let outcome = if measure.value <= measure.bound { Outcome::Passed } else { Outcome::Failed };
        self.send(id, outcome, sampled, Some(measure), at);
    }

    pub fn tally(&mut self, id: &str, tally: &Tally, unit: &'static str, sampled: &str) {
        let measure = Measure { value: tally.worst, bound: tally.bound, unit };
        self.found(id, Finding { sampled: format!("{} {sampled}", tally.n), measure, at: tally.at });
    }

    pub fn skipped(&mut self, id: &str, why: &str) {
        self.send(id, Outcome::Skipped(why.to_string()), String::new(), None, None);
    }
}
