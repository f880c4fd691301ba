//! The file of counts of instructions, and what is said of a count beside it.

#[path = "../../benches/counts/record.rs"]
#[allow(unused, reason = "the bench reads and writes the file")]
mod record;

use record::{Record, Verdict};

const TEXT: &str = "# rustc 1.95.0\nlookup, ids\t1000\nstep\t200\n";

#[test]
fn a_record_has_the_text_that_it_is_read_from() -> anyhow::Result<()> {
    let record = Record::parse(TEXT)?;
    assert_eq!(record.compiler, "rustc 1.95.0");
    assert_eq!(
        record.counts.iter().map(|(name, &count)| (name.as_str(), count)).collect::<Vec<_>>(),
        [("lookup, ids", 1000), ("step", 200)]
    );
    assert_eq!(record.text(), TEXT);
    Ok(())
}

#[test]
fn a_count_may_differ_by_three_percent() -> anyhow::Result<()> {
    let record = Record::parse(TEXT)?;
    assert_eq!(record.judge("lookup, ids", 969), Verdict::Less(0.969));
    assert_eq!(record.judge("lookup, ids", 970), Verdict::Same(0.97));
    assert_eq!(record.judge("lookup, ids", 1030), Verdict::Same(1.03));
    assert_eq!(record.judge("lookup, ids", 1031), Verdict::More(1.031));
    assert_eq!(record.judge("another", 1000), Verdict::New);
    Ok(())
}

#[test]
fn a_file_that_is_none_is_refused() {
    let refused = |text: &str| format!("{:#}", Record::parse(text).expect_err(text));
    assert_eq!(refused("step\t200\n"), "expected a first line `# ..`");
    assert_eq!(refused("# rustc\nstep 200\n"), "no tab in `step 200`");
    assert_eq!(refused("# rustc\nstep\tmany\n"), "`step\tmany`: invalid digit found in string");
    assert_eq!(refused("# rustc\nstep\t0\n"), "a count of 0 in `step\t0`");
    assert_eq!(refused("# rustc\nstep\t1\nstep\t2\n"), "`step` is there twice");
}
