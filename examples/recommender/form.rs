//! The forms of files of ratings.

use std::borrow::Cow;

use anyhow::{Context, Result, bail, ensure};

use crate::text::unquoted;

/// A line of a file.
pub(crate) struct Line<'l> {
    pub(crate) user: Cow<'l, str>,
    pub(crate) item: Cow<'l, str>,
    pub(crate) value: f32,
    /// The whole number below it, and the rest.
    pub(crate) time: (i64, f64),
}

/// The forms in which MovieLens has published its ratings, each a line of user, item, rating and time. Any of them may
/// have a header, and fields in double quotes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Form {
    /// `u.data` of MovieLens 100K: `196\t242\t3\t881250949`.
    Tabs,
    /// `ratings.dat` of MovieLens 1M and 10M: `1::1193::5::978300760`.
    Colons,
    /// `ratings.csv` since MovieLens 20M: `1,296,5.0,1147880044`, below a header.
    Csv,
}

/// The names that headers have for the fields, in the order of the fields; of letters only.
const HEADERS: [&[&str]; 4] = [
    &["user", "userid"],
    &["item", "itemid", "movie", "movieid"],
    &["rating", "score"],
    &["timestamp", "time", "unixtimestamp"],
];

impl Form {
    /// The form of a file that begins with `line`, and whether that line is a header.
    pub(crate) fn of(line: &str) -> Result<(Self, bool)> {
        for form in [Self::Tabs, Self::Colons, Self::Csv] {
            let fields = form.fields(line)?;
            if is_header(&fields) {
                return Ok((form, true));
            }
            // A line of text may have commas, and a title two colons; four fields with a number are ratings.
            let is_rating = fields.len() == 4 && fields[2].parse::<f32>().is_ok();
            if is_rating || form != Self::Csv && fields.len() > 1 {
                return Ok((form, false));
            }
        }
        bail!(
            "expected ratings separated by tabs or `::`, or the header `userId,movieId,rating,timestamp`, got `{}`",
            shortened(line)
        )
    }

    fn separator(self) -> &'static str {
        match self {
            Self::Tabs => "\t",
            Self::Colons => "::",
            Self::Csv => ",",
        }
    }

    /// The fields of a line, without white space and quotes around them.
    fn fields(self, line: &str) -> Result<Vec<Cow<'_, str>>> {
        let separator = self.separator();
        let mut fields: Vec<Cow<'_, str>> = Vec::with_capacity(4);
        let mut rest = Some(line);
        while let Some(text) = rest {
            let text = text.trim_start_matches(' ');
            let end = if text.starts_with('"') { quoted_field(text, separator)? } else { text.find(separator) };
            let field = text[..end.unwrap_or(text.len())].trim();
            fields.push(unquoted(field).unwrap_or(field.into()));
            rest = end.map(|end| &text[end + separator.len()..]);
        }
        Ok(fields)
    }

    /// The rating on a line.
    pub(crate) fn parse(self, line: &str) -> Result<Line<'_>> {
        let fields = self.fields(line)?;
        let count = fields.len();
        let Ok([user, item, value, time]) = <[Cow<'_, str>; 4]>::try_from(fields) else {
            let separator = self.separator();
            bail!("expected 4 fields separated by {separator:?}, got {count} in `{}`", shortened(line));
        };
        for (what, id) in [("user", &user), ("item", &item)] {
            ensure!(!id.is_empty(), "the {what} is missing in `{}`", shortened(line));
        }
        let number = value.parse::<f32>();
        let value = number.with_context(|| format!("the rating is not a number: `{}`", shortened(&value)))?;
        ensure!(value.is_finite(), "expected a finite rating, got {value}");
        let time = parse_time(&time)?;
        Ok(Line { user, item, value, time })
    }
}

/// Where the quoted field ends that `text` begins with; `None` if no other follows.
fn quoted_field(text: &str, separator: &str) -> Result<Option<usize>> {
    let mut places = text.char_indices().skip(1).filter(|&(_, letter)| letter == '"').map(|(place, _)| place);
    while let Some(place) = places.next() {
        if text[place + 1..].starts_with('"') {
            places.next(); // two quotes stand for one
            continue;
        }
        return Ok(text[place..].find(separator).map(|more| place + more));
    }
    bail!("a field in quotes does not end on its line: `{}`", shortened(text))
}

/// Whether these are the names of the fields, however they are spelled: `userId`, `user_id`, `user_id:token`.
fn is_header(fields: &[Cow<'_, str>]) -> bool {
    let plain = |field: &str| -> String {
        let name = field.split(':').next().unwrap_or_default();
        name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase()
    };
    fields.len() == HEADERS.len()
        && fields.iter().zip(HEADERS).all(|(field, names)| names.contains(&plain(field).as_str()))
}

/// A time in seconds, and what is beyond a whole one.
fn parse_time(text: &str) -> Result<(i64, f64)> {
    if let Ok(time) = text.parse() {
        return Ok((time, 0.0));
    }
    let what = || format!("the time is not a number, such as seconds since 1970: `{}`", shortened(text));
    let time: f64 = text.parse().with_context(what)?;
    ensure!(!time.is_nan(), what());
    ensure!(time.abs() < 2f64.powi(63), "the time is too large for 64 bits: `{}`", shortened(text));
    Ok((time.floor() as i64, time - time.floor()))
}

/// The part of a line that an error message quotes. A line may be of any length where the file is of another kind.
fn shortened(text: &str) -> String {
    text.chars().take(60).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_may_have_quotes() -> Result<()> {
        for (form, line) in [
            (Form::Csv, r#""7","Heat, the ""film""","3.5","10""#),
            (Form::Csv, r#"7, "Heat, the ""film""" ,3.5,10"#),
            (Form::Tabs, "7\t\"Heat, the \"\"film\"\"\"\t3.5\t10"),
            (Form::Colons, r#"7::Heat, the "film"::3.5::10"#),
        ] {
            assert_eq!(form.fields(line)?, ["7", r#"Heat, the "film""#, "3.5", "10"], "{line}");
        }
        let error = Form::Csv.fields(r#"7,"Heat"#).expect_err("open").to_string();
        assert_eq!(error, "a field in quotes does not end on its line: `\"Heat`");
        Ok(())
    }

    #[test]
    fn the_first_line_tells_the_form() -> Result<()> {
        for (line, expected) in [
            ("userId,movieId,rating,timestamp", (Form::Csv, true)),
            (r#""userId","movieId","rating","timestamp""#, (Form::Csv, true)),
            ("user_id:token\titem_id:token\trating:float\ttimestamp:float", (Form::Tabs, true)),
            ("UserID::MovieID::Rating::Timestamp", (Form::Colons, true)),
            ("1::1193::5::978300760", (Form::Colons, false)),
            ("A2SUAM1J3GNN3B,0000013714,5.0,1353", (Form::Csv, false)),
        ] {
            assert_eq!(Form::of(line)?, expected, "{line}");
        }
        for line in ["movieId,userId,rating,timestamp", "1;2;3;4", "one text, of words, and signs, only"] {
            assert!(Form::of(line).is_err(), "{line}");
        }
        Ok(())
    }

    #[test]
    fn times_are_numbers_of_any_kind() -> Result<()> {
        for (text, expected) in [
            ("978301000", (978_301_000, 0.0)),
            ("978301000.0", (978_301_000, 0.0)),
            ("9.78e8", (978_000_000, 0.0)),
            ("-1.25", (-2, 0.75)),
            ("9223372036854775807", (i64::MAX, 0.0)),
        ] {
            assert_eq!(parse_time(text)?, expected, "{text}");
        }
        let refused = |text| format!("{:#}", parse_time(text).expect_err(text));
        assert_eq!(refused("9223372036854775808"), "the time is too large for 64 bits: `9223372036854775808`");
        assert_eq!(refused("1e400"), "the time is too large for 64 bits: `1e400`");
        for text in ["2000-12-31", "NaN", ""] {
            assert!(refused(text).starts_with("the time is not a number, such as seconds since 1970: `"), "{text}");
        }
        Ok(())
    }
}
