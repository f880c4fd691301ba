//! Texts and their classes: read, freed of repetitions, and split into what is trained on and what is kept.

mod read;
pub(crate) mod tree;

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Result, ensure};
use rand::{rngs::StdRng, seq::SliceRandom};

pub(crate) use self::read::read;

/// A text and the number of its class.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Example {
    pub(crate) label: u32,
    pub(crate) text: String,
}

/// All texts of a run. No text stands in it twice.
pub(crate) struct Data {
    /// The classes, in alphabetical order.
    pub(crate) labels: Vec<String>,
    pub(crate) train: Vec<Example>,
    pub(crate) test: Vec<Example>,
    /// How many texts were left out because they had been there before, in the same class.
    pub(crate) repeated: usize,
    /// How many were left out because they stand in more than one class.
    pub(crate) ambiguous: usize,
}

impl Data {
    /// Leaves out what is repeated and splits the rest at random, the same share of each class.
    ///
    /// Texts that differ in white space only are the same, so that none is trained on and tested with.
    pub(crate) fn new(labelled: Vec<(String, String)>, test_share: f64, rng: &mut StdRng) -> Result<Self> {
        let all = labelled.len();
        let names: HashSet<&str> = labelled.iter().map(|(label, _)| label.as_str()).collect();
        let (names, first) = (names.len(), labelled.first().map(|(label, _)| label.clone()));
        let mut classes: HashMap<String, Option<String>> = HashMap::new();
        let mut order = Vec::new();
        for (label, text) in labelled {
            let key = text.split_whitespace().collect::<Vec<_>>().join(" ");
            match classes.get_mut(&key) {
                None => {
                    classes.insert(key.clone(), Some(label));
                    order.push(key);
                }
                Some(known) if known.as_ref() != Some(&label) => *known = None,
                Some(_) => {}
            }
        }
        let mut by_class: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut unambiguous = 0;
        for text in &order {
            if let Some(Some(label)) = classes.get(text) {
                by_class.entry(label.clone()).or_default().push(text.clone());
                unambiguous += 1;
            }
        }
        let ambiguous = order.len() - unambiguous;
        let hint = if names > order.len() {
            format!(": there are {names} classes and {} different texts, so are the columns swapped?", order.len())
        } else if by_class.len() < 2 && ambiguous > 0 {
            format!(", since {ambiguous} of {} different texts have more than one class", order.len())
        } else {
            String::new()
        };
        ensure!(by_class.len() >= 2, "expected texts of at least 2 classes, got {}{hint}", by_class.len());

        let (mut train, mut test) = (Vec::new(), Vec::new());
        for (label, (name, texts)) in (0..).zip(&mut by_class) {
            let count = texts.len();
            let is_header = hint.is_empty() && first.as_ref() == Some(name);
            let header = if is_header { ": if the first line is a header, take it out" } else { "" };
            ensure!(
                count >= 2,
                "expected at least 2 different texts of each class, got {count} of {name:?}{hint}{header}"
            );
            texts.shuffle(rng);
            let kept = ((test_share * count as f64).round() as usize).clamp(1, count - 1);
            let mut examples = texts.drain(..).map(|text| Example { label, text });
            test.extend(examples.by_ref().take(kept));
            train.extend(examples);
        }
        let labels = by_class.into_keys().collect();
        Ok(Self { labels, train, test, repeated: all - order.len(), ambiguous })
    }

    /// How many examples of each class there are.
    pub(crate) fn counts(&self, examples: &[Example]) -> Vec<usize> {
        let mut counts = vec![0; self.labels.len()];
        examples.iter().for_each(|example| counts[example.label as usize] += 1);
        counts
    }

    /// The share of the test that belongs to its largest class: what a model reaches that always says the same.
    pub(crate) fn largest_class(&self) -> f64 {
        let largest = self.counts(&self.test).into_iter().max().unwrap_or(0);
        largest as f64 / self.test.len() as f64
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rand::SeedableRng;

    use super::*;

    fn labelled(texts: &[(&str, &str)]) -> Vec<(String, String)> {
        texts.iter().map(|(label, text)| ((*label).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn no_text_is_there_twice_and_none_has_two_classes() -> Result<()> {
        let mut texts = labelled(&[("b", "one  two"), ("b", "one two"), ("a", "both"), ("b", "both"), ("b", "both")]);
        texts.extend((0..40).map(|i| (["a", "b"][i % 2].to_owned(), format!("text {i}"))));
        let data = Data::new(texts, 0.25, &mut StdRng::seed_from_u64(1))?;
        assert_eq!((data.repeated, data.ambiguous), (3, 1));
        assert_eq!(data.labels, ["a", "b"]);
        // 20 of a, of which 5 are kept; 21 of b.
        assert_eq!((data.counts(&data.test), data.counts(&data.train)), (vec![5, 5], vec![15, 16]));
        assert_eq!(data.largest_class(), 0.5);
        let mut all: Vec<&str> = data.train.iter().chain(&data.test).map(|example| example.text.as_str()).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 41);
        assert!(all.contains(&"one two") && !all.contains(&"both"));
        Ok(())
    }

    #[test]
    fn the_split_depends_on_the_seed_and_on_nothing_else() -> Result<()> {
        let texts = || (0..40).map(|i| (["a", "b"][i % 2].to_owned(), format!("text {i}"))).collect::<Vec<_>>();
        let test = |seed| Ok::<_, anyhow::Error>(Data::new(texts(), 0.25, &mut StdRng::seed_from_u64(seed))?.test);
        assert_eq!(test(1)?, test(1)?);
        assert_ne!(test(1)?, test(2)?);
        Ok(())
    }

    #[test]
    fn mistakes_name_the_line_or_the_class() -> Result<()> {
        let path = std::env::temp_dir().join(format!("finetune-{}.tsv", std::process::id()));
        fs::write(&path, "a\tone\n\nb no tab\n")?;
        let error = read(&path).expect_err("no tab").to_string();
        assert!(error.ends_with(":3: expected a class, a tab and a text"), "{error}");
        fs::write(&path, "a\tone\ttwo\n b \t three \n")?;
        assert_eq!(read(&path)?, labelled(&[("a", "one\ttwo"), ("b", "three")]));
        fs::remove_file(&path)?;
        assert!(format!("{:#}", read(&path).expect_err("no file")).contains("cannot read"));

        let refused = |texts| match Data::new(labelled(texts), 0.5, &mut StdRng::seed_from_u64(1)) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        assert_eq!(refused(&[("a", "one"), ("a", "two")]), "expected texts of at least 2 classes, got 1");
        let few = "expected at least 2 different texts of each class, got 1 of \"b\"";
        assert_eq!(refused(&[("a", "one"), ("a", "two"), ("b", "three"), ("b", "three")]), few);
        let header = [("label", "text"), ("a", "one"), ("a", "two"), ("b", "three"), ("b", "four")];
        let expected = "expected at least 2 different texts of each class, got 1 of \"label\": if the first line is a header, \
                        take it out";
        assert_eq!(refused(&header), expected);
        let swapped = [("one", "a"), ("two", "a"), ("three", "b"), ("four", "b")];
        let expected = "expected texts of at least 2 classes, got 0: there are 4 classes and 2 different texts, so are the \
                        columns swapped?";
        assert_eq!(refused(&swapped), expected);
        let ambiguous = [("a", "one"), ("b", "one"), ("a", "two"), ("a", "three")];
        let expected =
            "expected texts of at least 2 classes, got 1, since 1 of 3 different texts have more than one class";
        assert_eq!(refused(&ambiguous), expected);
        Ok(())
    }
}
