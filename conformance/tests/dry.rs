//! Every subject passes without a dump: one that does not is broken itself.

use std::path::Path;

use ckpt_conformance::case::Case;
use ckpt_conformance::trial::{self, Way};
use ckpt_conformance::{cases, matrix, suite};
use libtest_mimic::{Failed, Trial};

fn try_it(case: &Case, way: &Way) -> Result<(), Failed> {
    let subject = Path::new(env!("CARGO_BIN_EXE_ckpt-subject"));
    Ok(suite::ROOM.with_place(case, || trial::run(case, way, subject))?)
}

fn main() {
    trial::be_a_trial_if_asked();
    let ordinary = cases::all().into_iter().filter(|case| case.privileged.is_none() && matrix::missing(case).is_none());
    let ordinary = ordinary
        .filter(|_| ckpt_conformance::ordinary::probe().is_ok())
        .map(|case| Trial::test(format!("dry@nobody {}", case.name), move || try_it(&case, &Way::OrdinaryDry)));
    let trials = cases::all().into_iter().map(|case| {
        let missing = matrix::missing(&case);
        if let Some(missing) = &missing {
            println!("skipped: dry {}: {missing}", case.name);
        }
        let name = format!("dry {}", case.name);
        Trial::test(name, move || try_it(&case, &Way::Dry)).with_ignored_flag(missing.is_some())
    });
    libtest_mimic::run(&suite::arguments(), trials.chain(ordinary).collect()).exit();
}
