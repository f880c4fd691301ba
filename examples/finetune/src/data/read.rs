//! A file of texts: a line for each, of its class, a tab and the text.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::text::{for_each_line, unquoted};

const EXPECTED: &str = "expected a class, a tab and a text";

/// Reads a file with lines of a class, a tab, and a text. Empty lines are left out. An error names the file and the line.
///
/// A class may stand in double quotes, as spreadsheets write fields. A text in quotes is taken for such a field if its
/// class is one, if it has tabs or line ends inside, or if the quotes in it are doubled; others are part of the text.
pub(crate) fn read(path: &Path) -> Result<Vec<(String, String)>> {
    let name = path.display().to_string();
    let file = File::open(path).with_context(|| format!("cannot read {name}"))?;
    let mut labelled = Vec::new();
    let mut open: Option<Open> = None;
    for_each_line(&name, BufReader::new(file), |number, line| {
        if let Some(mut field) = open.take() {
            if field.has_quoted_class || !line.contains('\t') {
                field.text.extend(["\n", line]);
                field.lines += 1;
                match has_odd_quotes(line) {
                    true => labelled.push(fields(&field.text)?),
                    false => open = Some(field),
                }
                return Ok(());
            }
            // Without a quoted class the next line with a tab is the next text, as if the quotes were none.
            ensure!(field.lines == 1, "a text in quotes, which begins on line {}, does not end", field.first);
            labelled.push(fields(&field.text)?);
        }
        let labelled_text = fields(line)?;
        match Open::new(number, line) {
            Some(field) => open = Some(field),
            None => labelled.push(labelled_text),
        }
        Ok(())
    })?;
    if let Some(Open { first, text, has_quoted_class, lines }) = open {
        ensure!(
            !has_quoted_class && lines == 1,
            "{name}:{first}: a text in quotes begins on this line and does not end"
        );
        labelled.push(fields(&text)?);
    }
    ensure!(!labelled.is_empty(), "{name}: there are no texts in this file");
    Ok(labelled)
}

/// A line whose text begins with quotes that do not end on it: a quoted field of several lines, or a text that begins so.
struct Open {
    /// The line's number.
    first: usize,
    /// The line, and those after it that belong to it.
    text: String,
    lines: usize,
    has_quoted_class: bool,
}

impl Open {
    fn new(first: usize, line: &str) -> Option<Self> {
        let (class, text) = line.split_once('\t')?;
        let is_open = text.trim_start().starts_with('"') && has_odd_quotes(text);
        let has_quoted_class = unquoted(class.trim()).is_some();
        is_open.then(|| Self { first, text: line.to_owned(), lines: 1, has_quoted_class })
    }
}

fn has_odd_quotes(text: &str) -> bool {
    !text.matches('"').count().is_multiple_of(2)
}

/// The class and the text of a line, or of the lines of a quoted field.
fn fields(line: &str) -> Result<(String, String)> {
    let (label, text) = line.split_once('\t').context(EXPECTED)?;
    let (label, text) = (label.trim(), text.trim());
    let (plain_label, plain_text) = (unquoted(label), unquoted(text));
    let is_field = plain_label.is_some() || text.contains("\"\"") || text.contains(['\t', '\n']);
    let text = plain_text.filter(|_| is_field).unwrap_or(text.into());
    let label = plain_label.unwrap_or(label.into());
    let (label, text) = (label.trim(), text.trim());
    ensure!(!label.is_empty() && !text.is_empty(), EXPECTED);
    Ok((label.to_owned(), text.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Reads these bytes from a file of a test's own; the error is without the file's name.
    fn read_bytes(test: &str, bytes: &[u8]) -> Result<Vec<(String, String)>, String> {
        let path = std::env::temp_dir().join(format!("finetune-read-{test}-{}.tsv", std::process::id()));
        let written = fs::write(&path, bytes);
        let result = read(&path);
        let _ = fs::remove_file(&path);
        written.map_err(|error| error.to_string())?;
        result.map_err(|error| format!("{error:#}").replace(&path.display().to_string(), "file"))
    }

    #[test]
    fn files_of_other_systems_say_the_same() {
        let expected = [("good", "a fine é day"), ("bad", "rain, again")];
        let expected = expected.map(|(label, text)| (label.to_owned(), text.to_owned()));
        for text in [
            "good\ta fine é day\nbad\train, again\n",
            "\u{feff}good\ta fine é day\r\nbad\train, again\r\n\r\n",
            "good\ta fine é day\rbad\train, again\r",
            "\"good\"\t\"a fine é day\"\n\"bad\"\t\"rain, again\"\n",
            " good \t a fine é day \n\n \n bad\train, again",
        ] {
            assert_eq!(read_bytes("systems", text.as_bytes()).as_deref(), Ok(&expected[..]), "{text:?}");
        }
    }

    #[test]
    fn quotes_that_are_no_field_s_are_kept() {
        for (line, text) in [
            (r#"a	"said" she"#, r#""said" she"#),
            (r#"a	"a quotation""#, r#""a quotation""#),
            (r#"a	"so ""he"" said""#, r#"so "he" said"#),
            (r#""a"	"a field""#, "a field"),
            ("a\t\"a field\twith a tab\"", "a field\twith a tab"),
            ("a\t\"a field\nof two lines\"", "a field\nof two lines"),
            ("a\t\"a \"\"field\"\"\r\n\r\nof two lines\"\r\n", "a \"field\"\nof two lines"),
            ("\"a\"\t\"a field\nof two lines\tand a tab\"", "a field\nof two lines\tand a tab"),
            ("a\t\"an inch", "\"an inch"),
            ("a\t3\" and more", "3\" and more"),
        ] {
            assert_eq!(read_bytes("quotes", line.as_bytes()), Ok(vec![("a".to_owned(), text.to_owned())]), "{line}");
        }
    }

    #[test]
    fn quotes_that_do_not_end_keep_no_other_text_from_being_read() {
        let expected = [("a", "\"one"), ("b", "two"), ("a", "\"three"), ("b", "four\"")];
        let expected = expected.map(|(label, text)| (label.to_owned(), text.to_owned()));
        assert_eq!(read_bytes("open", b"a\t\"one\nb\ttwo\na\t\"three\nb\tfour\"\n").as_deref(), Ok(&expected[..]));
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let refused = |bytes: &[u8]| read_bytes("refused", bytes).unwrap_err();
        assert_eq!(refused(b""), "file: there are no texts in this file");
        assert_eq!(refused(b"a,one\n"), "file:1: expected a class, a tab and a text");
        let open = "file:2: a text in quotes begins on this line and does not end";
        let expected = "file:4: a text in quotes, which begins on line 2, does not end";
        assert_eq!(refused(b"a\tone\nb\t\"two\nthree\nc\tfour\n"), expected);
        assert_eq!(refused(b"a\tone\nb\t\"two\nthree\nfour\n"), open);
        assert_eq!(refused(b"a\tone\n\"b\"\t\"two\nc\tthree\n"), open);
        assert_eq!(refused(b"a\tone\n\n\"\"\ttwo\n"), "file:3: expected a class, a tab and a text");
        assert!(refused(b"a\tone\nb\tcaf\xe9\n").starts_with("file:2: this is not UTF-8: byte 6"));
        let utf16: Vec<u8> = "\u{feff}a\tone\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert!(refused(&utf16).starts_with("file:1: this is UTF-16"));
    }
}
