//! The first command of a newcomer.

mod common;

use common::*;

#[test]
fn the_demo_works_and_leaves_nothing_behind() {
    let workshop = Workshop::new();
    let outcome = run(ckpt(["demo"]).env("TMPDIR", workshop.path()));
    outcome.assert_done();
    for word in ["started", "saved", "gone", "restored", "goes on", "It did not notice"] {
        assert!(outcome.out.contains(word), "{word} in: {}", outcome.out);
    }
    assert_eq!(names(workshop.path()), Vec::<String>::new());
}
