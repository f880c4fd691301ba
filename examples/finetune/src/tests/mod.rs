//! Whole runs of the program.

mod accumulate;
mod files;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;

use crate::memory::{self, Memory};
use crate::settings::Args;
use crate::setup::setup;
use crate::train::Length;
use crate::{progress, run};

/// A folder for one test, with texts of two classes that a word tells apart.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Result<Self> {
        let folder = Self(std::env::temp_dir().join(format!("finetune-run-{name}-{}", std::process::id())));
        fs::create_dir_all(&folder.0)?;
        let texts = (0..120).map(|i| {
            let (label, word) = [("calm", "lake"), ("wild", "storm")][i % 2];
            let place = ["north", "south", "east", "west"][i / 2 % 4];
            let times = "again ".repeat(i % 5);
            format!("{label}\tthe {word} in the {place} {times}number {i}\n")
        });
        fs::write(folder.0.join("texts.tsv"), texts.collect::<String>())?;
        Ok(folder)
    }

    fn args(&self, out: &str, options: &[&str]) -> Result<Args> {
        self.parse(out, &[&["--batch", "8"], options].concat())
    }

    /// Arguments without the size of a batch.
    fn parse(&self, out: &str, options: &[&str]) -> Result<Args> {
        let (data, out) = (self.text("texts.tsv"), self.text(out));
        let always = ["finetune", "--data", &data, "--out", &out, "--max-length", "16"];
        Ok(Args::try_parse_from(always.iter().chain(options))?)
    }

    fn run(&self, out: &str, options: &[&str]) -> Result<()> {
        run(&self.args(out, options)?)
    }

    fn text(&self, path: &str) -> String {
        self.0.join(path).display().to_string()
    }

    fn read(&self, path: impl AsRef<Path>) -> Result<Vec<u8>> {
        let path = self.0.join(path);
        fs::read(&path).with_context(|| path.display().to_string())
    }

    /// The newest checkpoint.
    fn checkpoint(&self, out: &str) -> Result<PathBuf> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.0.join(out))? {
            let path = entry?.path();
            if path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("checkpoint-")) {
                found.push(path);
            }
        }
        ensure!(found.len() == 1, "expected one checkpoint, got {found:?}");
        Ok(found.remove(0))
    }

    /// What the newest checkpoint says of the run.
    fn progress(&self, out: &str) -> Result<progress::Progress> {
        Ok(serde_json::from_slice(&self.read(self.checkpoint(out)?.join("progress.json"))?)?)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // If it cannot be removed, the system will.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_resumed_run_has_the_bits_of_an_unbroken_one() -> Result<()> {
    resume("plain", &[])?;
    resume("sums", &["--accumulate", "3", "--schedule", "cosine", "--pooling", "cls"])?;
    resume("rows", &["--sparse-embeddings", "--dtype", "bf16", "--state", "q8"])?;
    resume("exact", &["--sparse-embeddings=exact", "--dtype", "bf16", "--rounding", "master", "--state", "bf16"])?;
    resume("half", &["--dtype", "f16", "--train", "head", "--schedule", "constant"])
}

/// Stops a run at an evaluation and in the middle of an epoch, and goes on.
fn resume(name: &str, options: &[&'static str]) -> Result<()> {
    let folder = Folder::new(name)?;
    let with = |more: &[&'static str]| [options, &["--epochs", "2", "--evaluate-every", "3"], more].concat();
    folder.run("unbroken", &with(&[]))?;
    folder.run("resumed", &with(&["--stop-after", "3"]))?;
    // What a process leaves behind that was killed while it wrote.
    fs::create_dir(folder.0.join("resumed/checkpoint-2.partial"))?;
    fs::write(folder.0.join("resumed/checkpoint-2.partial/weights.safetensors"), "incomplete")?;
    folder.run("resumed", &with(&["--resume", "--stop-after", "5"]))?;
    folder.run("resumed", &with(&["--resume"]))?;

    for file in ["model.safetensors", "config.json", "tokenizer.json", "learning-curves.svg"] {
        ensure!(
            folder.read(Path::new("unbroken").join(file))? == folder.read(Path::new("resumed").join(file))?,
            "{file}"
        );
    }
    let (unbroken, resumed) = (folder.checkpoint("unbroken")?, folder.checkpoint("resumed")?);
    for file in ["weights.safetensors", "optimizer.safetensors", "progress.json"] {
        ensure!(folder.read(unbroken.join(file))? == folder.read(resumed.join(file))?, "{name}: {file} differs");
    }

    let refused = |out: &str, more: &[&'static str]| -> String {
        folder.run(out, &with(more)).err().map(|error| format!("{error:#}")).unwrap_or_default()
    };
    let error = refused("resumed", &["--resume", "--seed", "2"]);
    ensure!(error.contains("--seed 1, and this one has --seed 2"), "{error}");
    let error = refused("resumed", &["--resume", "--lr", "0.5"]);
    ensure!(error.contains("no --lr, and this one has --lr 0.5"), "{error}");
    if options.contains(&"constant") {
        // Here the learning rate does not depend on the number of steps.
        let more = |more: &[&'static str]| [options, &["--warmup", "0", "--evaluate-every", "3"], more].concat();
        folder.run("longer", &more(&["--epochs", "3"]))?;
        folder.run("more", &more(&["--epochs", "2"]))?;
        folder.run("more", &more(&["--epochs", "3", "--resume"]))?;
        let model = |out: &str| folder.read(Path::new(out).join("model.safetensors"));
        ensure!(model("longer")? == model("more")?, "more epochs are not those of a longer run");
    }
    let error = refused("resumed", &["--resume", "--max-steps", "5"]);
    ensure!(error.contains("no --max-steps, and this one has --max-steps 5"), "{error}");
    let error = refused("nowhere", &["--resume"]);
    ensure!(error.contains("there is no checkpoint"), "{error}");
    let texts = String::from_utf8(folder.read("texts.tsv")?)?;
    fs::write(folder.0.join("texts.tsv"), texts.replace("in the north", "in the far north"))?;
    let error = refused("resumed", &["--resume"]);
    ensure!(error.contains("a run on other texts"), "{error}");
    Ok(())
}

#[test]
fn a_run_learns_and_its_model_is_a_model_to_begin_with() -> Result<()> {
    let folder = Folder::new("learns")?;
    folder.run("first", &["--epochs", "6"])?;
    let first = folder.progress("first")?;
    let accuracy = |progress: &progress::Progress| progress.evaluations.last().map_or(0.0, |last| last.accuracy());
    assert!(accuracy(&first) > 0.95, "{}", accuracy(&first));
    assert!(first.steps.iter().all(|step| step.norm.is_some_and(|norm| norm > 0.0)));

    // The classifier is kept, so what it starts with is what it has learned.
    let first_folder = folder.text("first");
    folder.run("second", &["--model", &first_folder, "--epochs", "1", "--train", "head"])?;
    assert!(folder.progress("second")?.steps[0].loss < first.steps[0].loss / 2.0);

    let error = folder.run("first", &["--model", &first_folder]).expect_err("the same folder").to_string();
    assert!(error.contains("--out: expected another folder"), "{error}");
    Ok(())
}

#[test]
fn the_table_of_memory_is_as_computed_by_hand() -> Result<()> {
    let folder = Folder::new("memory")?;
    let (hidden, inner, layers, places, classes) = (128, 512, 2, 16, 2);
    let of = |options: &[&str]| -> Result<([Memory; 4], Memory, usize, usize)> {
        let mut run = setup(&folder.args("out", options)?)?;
        run.trainer.step(0)?;
        let (parts, total) = memory::measure(&run.trainer.varmap, &run.trainer.optimizer, &run.trainer.gradient_bytes)?;
        let (_, order) = run.trainer.order.context("an epoch has begun")?;
        let longest = order[0].iter().map(|&text| run.trainer.train[text].ids.len()).max().context("texts")?;
        Ok((parts, total, run.config.vocab_size, longest * order[0].len()))
    };
    let sizes = |words: usize| {
        let linear = |inputs: usize, outputs: usize| vec![inputs * outputs, outputs];
        let layer = [linear(hidden, hidden).repeat(4), vec![hidden; 4], linear(hidden, inner), linear(inner, hidden)];
        [
            vec![words * hidden],
            vec![places * hidden, 2 * hidden, hidden, hidden],
            layer.concat().repeat(layers),
            linear(hidden, classes),
        ]
    };
    let sum = |sizes: &[usize]| sizes.iter().sum::<usize>();
    // Two bytes a number, and four for each 1,024 of them.
    let q8 = |sizes: &[usize]| sizes.iter().map(|size| 2 * size + 4 * size.div_ceil(1024)).sum::<usize>();

    let (parts, total, words, _) = of(&[])?;
    for (memory, sizes) in parts.iter().zip(&sizes(words)) {
        let n = sum(sizes);
        assert_eq!(*memory, Memory { numbers: n, weights: 4 * n, gradients: 4 * n, moments: 8 * n });
    }
    assert_eq!(total.numbers, sizes(words).iter().map(|sizes| sum(sizes)).sum::<usize>());

    let (parts, _, words, _) = of(&["--dtype", "bf16", "--state", "q8"])?;
    for (memory, sizes) in parts.iter().zip(&sizes(words)) {
        let n = sum(sizes);
        assert_eq!(*memory, Memory { numbers: n, weights: 2 * n, gradients: 2 * n, moments: q8(sizes) });
    }

    let (parts, _, words, _) = of(&["--dtype", "bf16", "--state", "bf16", "--rounding", "master"])?;
    for (memory, sizes) in parts.iter().zip(&sizes(words)) {
        // The other half of each master beside the moments.
        let (n, units) = (sum(sizes), sizes.iter().map(|size| 4 * size.div_ceil(1024)).sum::<usize>());
        assert_eq!(*memory, Memory { numbers: n, weights: 2 * n, gradients: 2 * n, moments: (4 + 2) * n + units });
    }

    // A row of gradients for each token of the batch, in place of one for each word that there is.
    let (parts, ..) = of(&["--sparse-embeddings"])?;
    let (_, _, _, tokens) = of(&["--sparse-embeddings"])?;
    assert_eq!(parts[0].gradients, 4 * hidden * tokens);

    let (parts, total, words, _) = of(&["--train", "head"])?;
    let head = sum(&sizes(words)[3]);
    assert_eq!((total.gradients, total.moments), (4 * head, 8 * head));
    assert_eq!((parts[2].weights, parts[2].gradients), (4 * sum(&sizes(words)[2]), 0));
    Ok(())
}

#[test]
fn every_text_of_an_epoch_is_in_one_of_its_steps() -> Result<()> {
    let length = |options: &[&str], texts| -> Result<(usize, usize, usize, usize)> {
        let args = Args::try_parse_from([&["finetune"], options].concat())?;
        let Length { steps, steps_per_epoch, texts, calls } = Length::new(&args.settings, texts);
        Ok((steps, steps_per_epoch, texts, calls))
    };
    assert_eq!(length(&["--batch", "8", "--epochs", "3"], 33)?, (15, 5, 8, 1));
    assert_eq!(length(&["--batch", "8", "--epochs", "3", "--accumulate", "2"], 33)?, (9, 3, 16, 2));
    assert_eq!(length(&["--batch", "8", "--max-steps", "7"], 33)?, (7, 5, 8, 1));
    // More than there are is all of them, as for --batch.
    assert_eq!(length(&["--batch", "8", "--epochs", "1", "--accumulate", "6"], 33)?, (1, 1, 33, 5));
    assert_eq!(length(&["--batch", "99", "--epochs", "1"], 33)?, (1, 1, 33, 1));
    let most = usize::MAX.to_string();
    let most = ["--batch", &most, "--accumulate", &most, "--epochs", &most];
    assert_eq!(length(&most, 33)?, (usize::MAX, 1, 33, 1));
    Ok(())
}

#[test]
fn options_that_are_out_of_range_are_refused() {
    for options in
        [["--batch", "0"], ["--warmup", "1"], ["--max-length", "2"], ["--dropout", "-0.1"], ["--dtype", "f64"]]
    {
        let refused = Args::try_parse_from([&["finetune"][..], &options].concat()).err().map(|error| error.to_string());
        assert!(refused.as_ref().is_some_and(|error| error.contains(options[0])), "{options:?}: {refused:?}");
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn without_the_feature_a_gpu_is_refused() -> Result<()> {
    let error = run(&Args::try_parse_from(["finetune", "--device", "cuda"])?).expect_err("no feature");
    ensure!(format!("{error:#}").contains("built without the feature `cuda`"), "{error:#}");
    Ok(())
}
