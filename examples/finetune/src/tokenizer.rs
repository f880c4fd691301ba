//! Texts become numbers: by the tokenizer of a Hugging Face directory, or by one that is made for the texts at hand.

use std::path::Path;

use anyhow::{Context, Error, Result, bail, ensure};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::wordlevel::{WordLevel, WordLevelTrainer};
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer, TruncationParams};

use crate::data::Example;
use crate::files;

/// The file's name.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
/// Words that a tokenizer of ours knows, at most.
const MOST_WORDS: usize = 8192;
/// How often a word occurs that it knows.
const LEAST_OCCURRENCES: u64 = 2;
/// Fills up short texts, stands for what is not known, begins a text, ends it.
const SPECIAL: [&str; 4] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"];

/// A text as numbers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Encoded {
    pub(crate) label: u32,
    pub(crate) ids: Vec<u32>,
}

/// Reads the tokenizer of the folder `model`. What it says of padding is left out, since batches have lengths of their
/// own.
pub(crate) fn read(model: &Path, max_length: usize) -> Result<Tokenizer> {
    let path = model.join(TOKENIZER);
    let read = || prepare(Tokenizer::from_file(&path).map_err(Error::from_boxed)?, max_length);
    read().with_context(|| format!("cannot read {}", path.display()))
}

/// A tokenizer that knows the words of `texts` that occur more than once. A word is what stands between spaces and
/// punctuation; each sign of punctuation is one, too.
///
/// Words, not parts of words: `tokenizers` numbers those in another order in each process.
pub(crate) fn train<'t>(texts: impl Iterator<Item = &'t str> + Send, max_length: usize) -> Result<Tokenizer> {
    let train = || -> tokenizers::Result<Tokenizer> {
        let [_, unknown, first, last] = SPECIAL;
        let mut tokenizer = Tokenizer::new(WordLevel::builder().unk_token(unknown.into()).build()?);
        tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
        let trainer = WordLevelTrainer::builder()
            .min_frequency(LEAST_OCCURRENCES)
            .vocab_size(MOST_WORDS)
            .show_progress(false)
            .special_tokens(SPECIAL.map(|token| AddedToken::from(token, true)).to_vec())
            .build()?;
        tokenizer.train(&mut TrainerWrapper::from(trainer), texts)?;
        let number = |token: &str| tokenizer.token_to_id(token).unwrap_or_default();
        let around = TemplateProcessing::builder()
            .try_single(format!("{first} $A {last}"))?
            .special_tokens(vec![(first, number(first)), (last, number(last))])
            .build()?;
        tokenizer.with_post_processor(Some(around));
        Ok(tokenizer)
    };
    prepare(train().map_err(Error::from_boxed)?, max_length).context("cannot make a tokenizer of the texts")
}

/// Texts are cut to `max_length` tokens, and filled up by nobody but the batch that they are in.
fn prepare(mut tokenizer: Tokenizer, max_length: usize) -> Result<Tokenizer> {
    let truncation = TruncationParams { max_length, ..TruncationParams::default() };
    tokenizer.with_truncation(Some(truncation)).map_err(Error::from_boxed)?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// The number of the token that batches are filled up with.
pub(crate) fn padding(tokenizer: &Tokenizer) -> Result<u32> {
    let [padding, ..] = SPECIAL;
    tokenizer.token_to_id(padding).with_context(|| format!("the tokenizer has no token {padding}"))
}

/// How many tokens there are, those that were added included.
pub(crate) fn size(tokenizer: &Tokenizer) -> usize {
    tokenizer.get_vocab_size(true)
}

/// Texts as numbers, all of them below `vocab_size`.
pub(crate) fn encode(tokenizer: &Tokenizer, examples: &[Example], vocab_size: usize) -> Result<Vec<Encoded>> {
    let texts: Vec<&str> = examples.iter().map(|example| example.text.as_str()).collect();
    let encodings = tokenizer.encode_batch_fast(texts, true).map_err(Error::from_boxed)?;
    let encoded = examples.iter().zip(encodings).map(|(example, encoding)| {
        let ids = encoding.get_ids().to_vec();
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
            bail!("the tokenizer and the model do not fit: token {id}, and a vocab_size of {vocab_size}");
        }
        ensure!(!ids.is_empty(), "the tokenizer leaves nothing of the text {:?}", example.text);
        Ok(Encoded { label: example.label, ids })
    });
    encoded.collect()
}

/// A number that tells data sets apart: FNV-1a of the classes and tokens of all texts.
pub(crate) fn fingerprint<'t>(texts: impl IntoIterator<Item = &'t Encoded>) -> u64 {
    let numbers = texts.into_iter().flat_map(|text| {
        // What begins a text is no token, so that its end is part of the number, too.
        [u32::MAX, text.label].into_iter().chain(text.ids.iter().copied())
    });
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    numbers.flat_map(u32::to_le_bytes).fold(0xcbf2_9ce4_8422_2325, mix)
}

/// Writes the tokenizer into the folder `model`.
pub(crate) fn save(tokenizer: &Tokenizer, model: &Path) -> Result<()> {
    files::write(&model.join(TOKENIZER), |path| tokenizer.save(path, true).map_err(Error::from_boxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXTS: [&str; 3] = ["let x = y;", "let y = x_x;", "once"];

    #[test]
    fn the_same_texts_make_the_same_tokenizer() -> Result<()> {
        let json = || -> Result<String> { train(TEXTS.into_iter(), 9)?.to_string(false).map_err(Error::from_boxed) };
        let first = json()?;
        for _ in 0..8 {
            assert_eq!(json()?, first);
        }
        Ok(())
    }

    #[test]
    fn what_is_rare_is_unknown_and_what_is_long_is_cut() -> Result<()> {
        let tokenizer = train(TEXTS.into_iter(), 6)?;
        let example = |text: &str| Example { label: 1, text: text.into() };
        let examples = [example("let y;"), example("once x"), example("x x x x x x x x")];
        let vocab_size = size(&tokenizer);
        let tokens = |encoded: &Encoded| -> Vec<String> {
            encoded.ids.iter().map(|&id| tokenizer.id_to_token(id).unwrap_or_default()).collect()
        };
        let encoded = encode(&tokenizer, &examples, vocab_size)?;
        assert_eq!(tokens(&encoded[0]), ["[CLS]", "let", "y", ";", "[SEP]"]);
        assert_eq!(tokens(&encoded[1]), ["[CLS]", "[UNK]", "x", "[SEP]"]);
        assert_eq!(tokens(&encoded[2]), ["[CLS]", "x", "x", "x", "x", "[SEP]"]);
        assert_eq!(padding(&tokenizer)?, 0);

        let error = encode(&tokenizer, &examples, 4).expect_err("too few").to_string();
        assert!(error.contains("a vocab_size of 4"), "{error}");
        Ok(())
    }

    #[test]
    fn a_tokenizer_goes_through_its_file() -> Result<()> {
        let folder = std::env::temp_dir().join(format!("finetune-tokenizer-{}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        let error = read(&folder, 6).expect_err("no file");
        assert!(format!("{error:#}").contains("tokenizer.json"), "{error:#}");
        let tokenizer = train(TEXTS.into_iter(), 6)?;
        save(&tokenizer, &folder)?;
        let examples = [Example { label: 0, text: "let x = once;".into() }];
        let (before, after) = (encode(&tokenizer, &examples, 99)?, encode(&read(&folder, 6)?, &examples, 99)?);
        assert_eq!(before, after);
        std::fs::remove_dir_all(&folder)?;
        Ok(())
    }
}
