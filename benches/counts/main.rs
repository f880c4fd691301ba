//! Counts of instructions: the same on a busy machine and on an idle one, so that CI can hold them.
//!
//! ```text
//! cargo bench --bench counts -- --check            every case under valgrind, beside what the file says
//! cargo bench --bench counts -- --check lookup     the cases with `lookup` in their names
//! cargo bench --bench counts -- --record           writes the file
//! cargo bench --bench counts -- --list             the names of the cases
//! cargo bench --bench counts -- --test             runs every case once, without valgrind
//! ```
//!
//! A case of **cost** has its count in `x86_64.tsv`. A case of **growth** is counted at two sizes, n and 4n, and the
//! exponent between the two has a limit: 1.1 for what is linear. One thread does all work.
//!
//! valgrind shows programs a CPU of its own, with AVX2 and without AVX-512, if the machine has AVX2. So the counts are
//! those of the same instructions everywhere, and say nothing of AVX-512, of memory and of the kernel. They depend on the
//! compiler, and a little on the C library. One program has the same counts in every run, but for 0.2 % where hashes have
//! random keys. Another build may differ by up to 2 % in what it did not change: loops of the compiler ask which of two
//! arrays comes first in memory.
//!
//! | file | what it does |
//! | --- | --- |
//! | `case.rs` | what a case is |
//! | `cost.rs`, `recommender.rs` | the cases of cost |
//! | `vars.rs`, `rows.rs` | the cases of growth: in variables, groups and names; in ids, bags and rows |
//! | `callgrind.rs` | counts one call |
//! | `record.rs` | the file of counts, and what differs from it |
//! | `check.rs` | counts all cases and judges them |

mod callgrind;
mod case;
mod check;
mod cost;
mod recommender;
mod record;
mod rows;
#[path = "../support/mod.rs"]
#[allow(dead_code, reason = "memory's own speed is no count")]
mod support;
mod vars;

// The recommender's model and training, whose modules refer to each other by these names. Their tests, what they print and
// the files that they read are unused here.
#[path = "../../examples/common/bar.rs"]
#[allow(unused)]
mod bar;
#[path = "../../examples/recommender/data.rs"]
#[allow(unused)]
mod data;
#[path = "../../examples/common/device.rs"]
#[allow(unused)]
mod device;
#[path = "../../examples/recommender/evaluate.rs"]
#[allow(unused)]
mod evaluate;
#[path = "../../examples/recommender/form.rs"]
#[allow(unused)]
mod form;
#[path = "../../examples/common/laps.rs"]
#[allow(unused)]
mod laps;
#[path = "../../examples/recommender/model.rs"]
#[allow(unused)]
mod model;
#[path = "../../examples/common/options.rs"]
#[allow(unused)]
mod options;
#[path = "../../examples/common/program.rs"]
#[allow(unused)]
mod program;
#[path = "../../examples/recommender/random.rs"]
#[allow(unused)]
mod random;
#[path = "../../examples/recommender/settings.rs"]
#[allow(unused)]
mod settings;
#[path = "../../examples/recommender/split.rs"]
#[allow(unused)]
mod split;
#[path = "../../examples/recommender/synthetic.rs"]
#[allow(unused)]
mod synthetic;
#[path = "../../examples/common/text.rs"]
#[allow(unused)]
mod text;
#[path = "../../examples/recommender/train.rs"]
#[allow(unused)]
mod train;

use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::case::Case;
use crate::random::{Stream, random};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[&str]) -> Result<ExitCode> {
    let cases = cases();
    match *args {
        ["--check"] => return check::check(&cases, ""),
        ["--check", filter] => return check::check(&cases, filter),
        ["--record"] => check::record(&cases)?,
        ["--list"] => cases.iter().for_each(|case| println!("{}", case.name)),
        ["--test"] => cases.iter().try_for_each(Case::test)?,
        [callgrind::RUN, name, size] => {
            let case = cases.iter().find(|case| case.name == name).with_context(|| format!("no case `{name}`"))?;
            callgrind::run(case.work(size.parse().context("a size")?)?)?;
        }
        _ => println!("counts: nothing to do without --check, --record, --list or --test"),
    }
    Ok(ExitCode::SUCCESS)
}

/// All cases, in the order in which they are listed and counted.
fn cases() -> Vec<Case> {
    [cost::cases(), recommender::cases(), vars::cases(), rows::cases()].into_iter().flatten().collect()
}
