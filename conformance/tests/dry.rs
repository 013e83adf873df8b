//! Every subject passes without a dump: one that does not is broken itself.

use std::path::Path;

use ckpt_conformance::trial::{self, Way};
use ckpt_conformance::{cases, matrix, suite};
use libtest_mimic::Trial;

fn main() {
    trial::be_a_trial_if_asked();
    let subject = Path::new(env!("CARGO_BIN_EXE_ckpt-subject"));
    let ordinary = cases::all().into_iter().filter(|case| case.privileged.is_none() && matrix::missing(case).is_none());
    let ordinary = ordinary.filter(|_| ckpt_conformance::ordinary::probe().is_ok()).map(|case| {
        Trial::test(format!("dry@nobody {}", case.name), move || Ok(trial::run(&case, &Way::OrdinaryDry, subject)?))
    });
    let trials = cases::all().into_iter().map(|case| {
        let missing = matrix::missing(&case);
        if let Some(missing) = &missing {
            println!("skipped: dry {}: {missing}", case.name);
        }
        let name = format!("dry {}", case.name);
        Trial::test(name, move || Ok(trial::run(&case, &Way::Dry, subject)?)).with_ignored_flag(missing.is_some())
    });
    libtest_mimic::run(&suite::arguments(), trials.chain(ordinary).collect()).exit();
}
