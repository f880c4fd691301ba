//! Lines and fields of text files, as real tools write them.

use std::borrow::Cow;
use std::io::BufRead;

use anyhow::{Context, Result, anyhow, bail, ensure};

/// Reads the lines of the file `name` and hands each with its number, from 1, to `take`, but for those of white space
/// only. A line ends with LF, CR LF or CR. A byte order mark before a line is left out: Excel and Notepad begin files
/// with one, and files are joined.
///
/// An error names the file and the line; so does one of `take`.
pub(crate) fn for_each_line(
    name: &str,
    mut text: impl BufRead,
    mut take: impl FnMut(usize, &str) -> Result<()>,
) -> Result<()> {
    let (mut bytes, mut number) = (Vec::new(), 0);
    loop {
        bytes.clear();
        if text.read_until(b'\n', &mut bytes).with_context(|| format!("cannot read {name}"))? == 0 {
            return Ok(());
        }
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
        for line in bytes.split(|&byte| byte == b'\r') {
            number += 1;
            let mut take_line = || {
                let line = decoded(line)?;
                if line.trim().is_empty() { Ok(()) } else { take(number, line) }
            };
            take_line().map_err(|error| anyhow!("{name}:{number}: {error:#}"))?;
        }
    }
}

/// A line as text, without a byte order mark.
fn decoded(line: &[u8]) -> Result<&str> {
    const SAVE: &str = "save the file as UTF-8";
    ensure!(!line.starts_with(b"\xff\xfe") && !line.starts_with(b"\xfe\xff"), "this is UTF-16: {SAVE}");
    match std::str::from_utf8(line) {
        // Latin letters of UTF-16 and UTF-32 have such bytes between them.
        Ok(text) if text.contains('\0') => bail!("a byte 0x00 is in this line, as in UTF-16 and in no text: {SAVE}"),
        Ok(text) => Ok(text.strip_prefix('\u{feff}').unwrap_or(text)),
        Err(error) => {
            let at = error.valid_up_to();
            bail!("this is not UTF-8: byte {} of the line is 0x{:02X}: {SAVE}", at + 1, line[at])
        }
    }
}

/// The text between the quotes of RFC 4180, with two quotes inside for one; `None` if `field` is not a quoted field.
pub(crate) fn unquoted(field: &str) -> Option<Cow<'_, str>> {
    let inside = field.strip_prefix('"')?.strip_suffix('"')?;
    if !inside.contains('"') {
        return Some(inside.into());
    }
    let single = inside.replace("\"\"", "");
    (!single.contains('"')).then(|| inside.replace("\"\"", "\"").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &[u8]) -> Result<Vec<(usize, String)>> {
        let mut lines = Vec::new();
        for_each_line("file", text, |number, line| {
            lines.push((number, line.to_owned()));
            Ok(())
        })?;
        Ok(lines)
    }

    #[test]
    fn lines_end_as_on_any_system_and_marks_are_left_out() -> Result<()> {
        let expected = [(1, "one".to_owned()), (2, "two é".to_owned())];
        for text in
            ["one\ntwo é", "one\r\ntwo é\r\n", "one\rtwo é\r", "\u{feff}one\n\u{feff}two é\n\n \n", "one\rtwo é\n"]
        {
            assert_eq!(lines(text.as_bytes())?, expected, "{text:?}");
        }
        assert_eq!(lines(b"one\r\n\r\ntwo\r\r\nthree")?.iter().map(|line| line.0).collect::<Vec<_>>(), [1, 3, 5]);
        assert!(lines(b"")?.is_empty() && lines("\u{feff}".as_bytes())?.is_empty());
        Ok(())
    }

    #[test]
    fn other_encodings_are_named_with_their_line() {
        let refused = |text: &[u8]| format!("{:#}", lines(text).expect_err("not UTF-8"));
        let utf16 = |text: &str, mark: &[u8]| -> Vec<u8> {
            mark.iter().copied().chain(text.encode_utf16().flat_map(u16::to_le_bytes)).collect()
        };
        let latin = refused(b"one\ncaf\xe9\n");
        assert_eq!(latin, "file:2: this is not UTF-8: byte 4 of the line is 0xE9: save the file as UTF-8");
        assert_eq!(refused(&utf16("one", b"\xff\xfe")), "file:1: this is UTF-16: save the file as UTF-8");
        assert!(refused(&utf16("one\ntwo", b"")).starts_with("file:1: a byte 0x00"));
    }

    #[test]
    fn an_error_of_the_reader_has_file_and_line() {
        let error = for_each_line("file", &b"\none"[..], |_, line| bail!("no {line}")).expect_err("refused");
        assert_eq!(format!("{error:#}"), "file:2: no one");
    }

    #[test]
    fn quotes_are_those_of_csv() {
        assert_eq!(unquoted(r#""one""#).as_deref(), Some("one"));
        assert_eq!(unquoted(r#""say ""one"".""#).as_deref(), Some(r#"say "one"."#));
        for field in ["one", r#""one" two"#, r#""one" and "two""#, "\"", r#""one"""#] {
            assert_eq!(unquoted(field), None, "{field}");
        }
        assert_eq!(unquoted(r#""""#).as_deref(), Some(""));
    }
}
