//! Counts cases, and judges them.

use std::collections::BTreeMap;
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use std::{env, process, thread};

use anyhow::{Context, Result, ensure};

use crate::callgrind;
use crate::case::{Case, Growth};
use crate::record::{Record, TOLERANCE, Verdict};

/// The remedy where the file is out of date.
const RECORD: &str =
    "run `cargo bench --bench counts -- --record`, and commit the file together with what changed the count";
/// The width of names.
const WIDTH: usize = 46;

/// Counts the cases with `filter` in their names, prints each, and fails if one is not as it must be.
pub(crate) fn check(cases: &[Case], filter: &str) -> Result<ExitCode> {
    let start = Instant::now();
    let record = match comparable(Record::read()?)? {
        Ok(record) => Some(record),
        Err(why) => {
            println!("only growth is checked: {why}\n");
            None
        }
    };
    let chosen = |case: &&Case| case.name.contains(filter) && (record.is_some() || case.growth.is_some());
    let chosen: Vec<&Case> = cases.iter().filter(chosen).collect();
    ensure!(!chosen.is_empty(), "no case has `{filter}` in its name");
    let counted: Vec<_> = chosen.iter().copied().zip(count_all(&chosen)?).collect();
    let mut wrong = Vec::new();
    if let Some(record) = &record {
        wrong.extend(costs(&counted, record));
        if filter.is_empty() {
            let exists = |name: &&String| cases.iter().any(|case| case.growth.is_none() && case.name == **name);
            let surplus = record.counts.keys().filter(|name| !exists(name));
            wrong.extend(surplus.map(|name| format!("{name}: the file has it, and there is no such case: {RECORD}")));
        }
    }
    wrong.extend(growths(&counted));
    println!("\n{} cases, {:.0} s", chosen.len(), start.elapsed().as_secs_f64());
    wrong.iter().for_each(|what| println!("error: {what}"));
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A case, and its count at each of its sizes.
type Counted<'c> = (&'c Case, Vec<u64>);

/// Prints the counts beside the recorded ones. Returns what is wrong.
fn costs(counted: &[Counted<'_>], record: &Record) -> Vec<String> {
    let mut wrong = Vec::new();
    println!("{:<WIDTH$} {:>13} {:>13} {:>7}", "cost", "recorded", "now", "ratio");
    for (case, counts) in counted.iter().filter(|(case, _)| case.growth.is_none()) {
        let (name, count) = (&case.name, counts[0]);
        let recorded = record.counts.get(name).map_or("-".to_owned(), u64::to_string);
        let verdict = record.judge(name, count);
        let (ratio, said) = match verdict {
            Verdict::Same(ratio) => (Some(ratio), ""),
            Verdict::More(ratio) => (Some(ratio), "  MORE"),
            Verdict::Less(ratio) => (Some(ratio), "  LESS"),
            Verdict::New => (None, "  NEW"),
        };
        let ratio = ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.3}"));
        println!("{name:<WIDTH$} {recorded:>13} {count:>13} {ratio:>7}{said}");
        wrong.extend(complaint(verdict).map(|what| format!("{name}: {what}")));
    }
    wrong
}

/// Prints the counts at both sizes, and how they grow. Returns what is wrong.
fn growths(counted: &[Counted<'_>]) -> Vec<String> {
    let mut wrong = Vec::new();
    println!("\n{:<WIDTH$} {:>13} {:>13} {:>7}", "growth", "at n", "at 4n", "power");
    for (case, counts) in counted {
        let (name, Some(Growth { n, at_most }), &[small, large]) = (&case.name, case.growth, &counts[..]) else {
            continue;
        };
        let power = (large as f64 / small as f64).ln() / 4f64.ln();
        let said = if power > at_most { "  MORE" } else { "" };
        println!("{name:<WIDTH$} {small:>13} {large:>13} {power:>7.3}{said}");
        if power > at_most {
            wrong.push(format!("{name}: grows with the power {power:.3} from n = {n} on, and may with {at_most}"));
        }
    }
    wrong
}

/// Counts the cases of cost and writes the file.
pub(crate) fn record(cases: &[Case]) -> Result<()> {
    let costs: Vec<&Case> = cases.iter().filter(|case| case.growth.is_none()).collect();
    let counts = costs.iter().zip(count_all(&costs)?).map(|(case, counts)| (case.name.clone(), counts[0]));
    let record = Record { compiler: compiler()?, counts: counts.collect() };
    println!("{} counts in {}", record.counts.len(), record.write()?.display());
    Ok(())
}

/// The complaint about a count, if there is one.
fn complaint(verdict: Verdict) -> Option<String> {
    let (percent, allowed) = (|ratio: f64| 100.0 * (ratio - 1.0).abs(), 100.0 * TOLERANCE);
    match verdict {
        Verdict::Same(_) => None,
        Verdict::More(ratio) => {
            Some(format!("{:.1} % more instructions than recorded, where {allowed} % are allowed", percent(ratio)))
        }
        Verdict::Less(ratio) => Some(format!("{:.1} % fewer instructions than recorded: {RECORD}", percent(ratio))),
        Verdict::New => Some(format!("the file does not have it: {RECORD}")),
    }
}

/// The counts of each case, one for each of its sizes. As many run at a time as there are cores: they do not disturb
/// each other's counts.
fn count_all(cases: &[&Case]) -> Result<Vec<Vec<u64>>> {
    let sizes = |(index, case): (usize, &&Case)| case.sizes().into_iter().map(move |size| (index, size));
    let jobs: Vec<(usize, usize)> = cases.iter().enumerate().flat_map(sizes).collect();
    let names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    let (next, counted) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let work = || -> Result<()> {
        while let Some(&(index, size)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let out = env::temp_dir().join(format!("candle-adamax-counts-{}-{index}-{size}.out", process::id()));
            let count = callgrind::count(names[index], size, &out)?;
            counted.lock().unwrap_or_else(|error| error.into_inner()).insert((index, size), count);
        }
        Ok(())
    };
    let threads = thread::available_parallelism()?.get();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().ok().context("a thread panicked")?)
    })?;
    let counted = counted.into_inner().unwrap_or_else(|error| error.into_inner());
    let of = |index: usize| counted.range((index, 0)..(index + 1, 0)).map(|(_, &count)| count).collect();
    Ok((0..cases.len()).map(of).collect())
}

/// The record, or why counts cannot be compared with it.
fn comparable(record: Option<Record>) -> Result<Result<Record, String>> {
    let compiler = compiler()?;
    Ok(match record {
        None => Err("no counts of this architecture are recorded".to_owned()),
        Some(record) if record.compiler != compiler => {
            Err(format!("this is {compiler}, and the counts are those of {}", record.compiler))
        }
        Some(_) if !has_avx2() => Err("the counts are those of AVX2, which this CPU does not have".to_owned()),
        Some(record) => Ok(record),
    })
}

/// Whether valgrind's CPU has what the counts are made with.
fn has_avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    true
}

/// The compiler's version, on one line.
fn compiler() -> Result<String> {
    let rustc = env::var_os("RUSTC").unwrap_or("rustc".into());
    let output = Command::new(rustc).arg("--version").output().context("cannot ask rustc for its version")?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
