//! Files of ratings, and runs of the example `recommender`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use crate::common::folder::Folder;
use crate::program::{printed, refused, run};

/// The example, which is built first: `cargo test` builds its unit tests only.
fn program() -> &'static Path {
    static PROGRAM: LazyLock<PathBuf> = LazyLock::new(|| {
        let test = std::env::current_exe().unwrap();
        let profile = test.parent().and_then(Path::parent).unwrap();
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--example", "recommender", "--target-dir"]).arg(profile.parent().unwrap());
        if profile.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap().success());
        profile.join("examples").join(format!("recommender{}", std::env::consts::EXE_SUFFIX))
    });
    &PROGRAM
}

fn train(folder: &Folder, data: &Path, more: &[&str]) -> Output {
    let (data, out) = (data.display().to_string(), folder.file("out").display().to_string());
    let always = ["--data", &data, "--out", &out, "--epochs", "1", "--batch", "32", "--threads", "1"];
    run(program(), &[&always, more].concat())
}

/// Ratings of 12 users, each of some of 30 items: user, item, rating, time.
fn ratings() -> Vec<(u64, u64, u64, u64)> {
    let of = |user| (0..10).map(move |k| (user, 1 + (user * 7 + k * 3) % 30, 1 + (user + k) % 5, 978_301_000 + k));
    (1..=12).flat_map(of).collect()
}

fn tabs(line: impl Fn((u64, u64, u64, u64)) -> String) -> String {
    ratings().into_iter().map(line).collect()
}

/// The lines of a run that tell its results.
fn results(output: &Output) -> Vec<String> {
    let lines = printed(output);
    lines.lines().filter(|line| line.contains("epoch")).map(str::to_owned).collect()
}

// NatLibFi/Annif#307, dotnet/machinelearning#544, PreferredAI/cornac#500, ocelma/python-recsys#23
#[test]
fn ratings_as_spreadsheets_and_scripts_write_them_are_read() {
    let folder = Folder::new();
    let plain = tabs(|(user, item, value, time)| format!("{user}\t{item}\t{value}\t{time}\n"));
    let csv = |mark: &str, end: &str, time: fn(u64) -> String| {
        let rows = ratings().into_iter().map(|(u, i, r, t)| format!("{u},{i},{r}.0,{}{end}", time(t)));
        format!("{mark}userId,movieId,rating,timestamp{end}{}", rows.collect::<String>())
    };
    let forms = [
        ("a mark", format!("\u{feff}{plain}")),
        ("a mark and a header", csv("\u{feff}", "\r\n", |t| t.to_string())),
        ("an empty last line", format!("{plain}\n\n")),
        ("line ends of Windows", plain.replace('\n', "\r\n")),
        ("times with a fraction", csv("", "\n", |t| format!("{t}.0"))),
        ("times in scientific notation", csv("", "\n", |t| format!("{}e0", t as f64))),
        ("colons and an empty line", plain.replace('\t', "::") + "\n"),
    ];
    let expected = train(&folder, &folder.write("plain.data", &plain), &[]);
    let expected = printed(&expected);
    for (what, text) in forms {
        let output = train(&folder, &folder.write("form.data", text), &[]);
        let got = printed(&output);
        let counts = |text: &str| text.lines().find(|line| line.contains("ratings")).map(str::to_owned);
        assert!(counts(&got).is_some(), "{got}");
        let of = |text: &str| counts(text).unwrap().replace("form.data", "plain.data");
        assert_eq!(of(&got), of(&expected), "{what}");
    }
    assert!(!results(&train(&folder, &folder.file("plain.data"), &[])).is_empty(), "{expected}");
}

// RUCAIBox/RecBole#965, RUCAIBox/RecBole#1822
#[test]
fn another_encoding_is_named_with_its_line() {
    let folder = Folder::new();
    let text = tabs(|(user, item, value, time)| format!("{user}\t{item}\t{value}\t{time}\n"));
    let data = folder.write("latin.data", [text.as_bytes(), b"caf\xe9\t1\t3\t4\n"].concat());
    let error = refused(&train(&folder, &data, &[]));
    assert!(error.contains("latin.data:121") && error.contains("UTF-8"), "{error}");
}

// RUCAIBox/RecBole#2193, recommenders-team/recommenders#2163
#[test]
fn a_user_who_has_every_item_does_not_keep_sampling_from_ending() {
    let folder = Folder::new();
    let mut text = tabs(|(user, item, value, time)| format!("{user}\t{item}\t{value}\t{time}\n"));
    text.extend((1..=30).map(|item| format!("99\t{item}\t3\t{item}\n")));
    printed(&train(&folder, &folder.write("one.data", text), &[]));
    // Where all users are such, there is nothing to sample, and the error says so.
    let all: String = (1..=12).flat_map(|u| (1..=8).map(move |i| format!("{u}\t{i}\t3\t{i}\n"))).collect();
    let error = refused(&train(&folder, &folder.write("all.data", all), &[]));
    assert!(error.contains("every"), "{error}");
}

// deepinsight/insightface#2143
#[test]
fn a_run_that_is_resumed_with_more_epochs_goes_on_or_says_why_not() {
    let folder = Folder::new();
    let text = tabs(|(user, item, value, time)| format!("{user}\t{item}\t{value}\t{time}\n"));
    let data = folder.write("ratings.data", text);
    printed(&train(&folder, &data, &["--schedule", "exponential"]));
    let (data_text, out) = (data.display().to_string(), folder.file("out").display().to_string());
    let resume = |epochs: &str, schedule: &str| {
        let args = ["--data", &data_text, "--out", &out, "--batch", "32", "--threads", "1", "--resume"];
        run(program(), &[&args[..], &["--epochs", epochs, "--schedule", schedule]].concat())
    };
    printed(&resume("2", "exponential"));
    // A cosine is made for a number of epochs.
    printed(&train(&folder, &data, &["--schedule", "cosine"]));
    let error = refused(&resume("2", "cosine"));
    assert!(error.contains("--epochs"), "{error}");
}

// safetensors/safetensors#782, UKPLab/sentence-transformers#4010
#[cfg(unix)]
#[test]
fn the_files_of_a_run_have_the_mode_of_the_umask() {
    let folder = Folder::new();
    let text = tabs(|(user, item, value, time)| format!("{user}\t{item}\t{value}\t{time}\n"));
    printed(&train(&folder, &folder.write("ratings.data", text), &[]));
    let mut files = vec![folder.file("out")];
    let mut seen = 0;
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            assert_eq!(crate::program::mode(&path), crate::program::usual_mode(folder.path()), "{path:?}");
            seen += 1;
        }
    }
    assert!(seen >= 3, "{seen}");
}
