//! Ratings, read from a file of MovieLens in any of its three forms, with the ids made dense.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
    str::FromStr,
};

use anyhow::{Context, Result, bail, ensure};

/// One user's rating of one item. Users and items are numbered from 0, without gaps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rating {
    pub(crate) user: u32,
    pub(crate) item: u32,
    pub(crate) value: f32,
    /// Any clock that orders the ratings of a user; seconds since 1970 in MovieLens.
    pub(crate) time: i64,
}

/// All ratings of a data set; each pair of user and item occurs at most once.
#[derive(Debug)]
pub(crate) struct Ratings {
    pub(crate) list: Vec<Rating>,
    pub(crate) users: usize,
    pub(crate) items: usize,
}

impl Ratings {
    /// Reads `path`; which of the [forms](Form) it has is told by its first line.
    ///
    /// An error names the file and, where there is one, the line.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| format!("cannot open {name}"))?;
        Self::parse(&name, BufReader::new(file))
    }

    fn parse(name: &str, text: impl BufRead) -> Result<Self> {
        let (mut users, mut items) = (Numbering::default(), Numbering::default());
        let (mut list, mut form) = (Vec::new(), None);
        for (index, line) in text.lines().enumerate() {
            let at = || format!("{name}:{}", index + 1);
            let line = line.with_context(at)?;
            let form = match form {
                Some(form) => form,
                None => {
                    let found = *form.insert(Form::of(&line).with_context(at)?);
                    if found == Form::Csv {
                        continue; // the header
                    }
                    found
                }
            };
            let (user, item, value, time) = form.parse(&line).with_context(at)?;
            list.push(Rating { user: users.number(user), item: items.number(item), value, time });
        }
        ensure!(!list.is_empty(), "{name}: there are no ratings in this file");
        let ratings = Self { list, users: users.len(), items: items.len() };
        if let Some((first, second)) = ratings.find_repeated() {
            let line = |index| index + 1 + usize::from(form == Some(Form::Csv));
            bail!("{name}:{}: this user has rated this item before, on line {}", line(second), line(first));
        }
        Ok(ratings)
    }

    /// Two positions at which the same pair of user and item stands.
    fn find_repeated(&self) -> Option<(usize, usize)> {
        let pair = |&index: &usize| (self.list[index].user, self.list[index].item);
        let mut order: Vec<usize> = (0..self.list.len()).collect();
        order.sort_by_key(pair); // stable, so equal pairs stay in the order of the file
        order.windows(2).find(|two| pair(&two[0]) == pair(&two[1])).map(|two| (two[0], two[1]))
    }

    /// A number that tells data sets apart: FNV-1a of all ratings.
    pub(crate) fn fingerprint(&self) -> u64 {
        let bytes = self.list.iter().flat_map(|rating| {
            let ids = u64::from(rating.user) << 32 | u64::from(rating.item);
            [ids, u64::from(rating.value.to_bits()), rating.time as u64].into_iter().flat_map(u64::to_le_bytes)
        });
        bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    }
}

/// Numbers from 0 for ids, in the order in which they turn up.
#[derive(Default)]
struct Numbering(HashMap<i64, u32>);

impl Numbering {
    fn number(&mut self, id: i64) -> u32 {
        let next = self.0.len() as u32;
        *self.0.entry(id).or_insert(next)
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

/// The forms in which MovieLens has published its ratings, each a line of user, item, rating and time.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    /// `u.data` of MovieLens 100K: `196\t242\t3\t881250949`.
    Tabs,
    /// `ratings.dat` of MovieLens 1M and 10M: `1::1193::5::978300760`.
    Colons,
    /// `ratings.csv` since MovieLens 20M: `1,296,5.0,1147880044`, below a header.
    Csv,
}

impl Form {
    /// The form of a file that begins with `line`.
    fn of(line: &str) -> Result<Self> {
        match line.trim_end() {
            "userId,movieId,rating,timestamp" => Ok(Self::Csv),
            line if line.contains('\t') => Ok(Self::Tabs),
            line if line.contains("::") => Ok(Self::Colons),
            line => bail!(
                "expected ratings separated by tabs or `::`, or the header `userId,movieId,rating,timestamp`, got `{}`",
                shortened(line),
            ),
        }
    }

    fn parse(self, line: &str) -> Result<(i64, i64, f32, i64)> {
        let separator = match self {
            Self::Tabs => "\t",
            Self::Colons => "::",
            Self::Csv => ",",
        };
        let fields: Vec<&str> = line.split(separator).map(str::trim).collect();
        let &[user, item, value, time] = fields.as_slice() else {
            bail!("expected 4 fields separated by {separator:?}, got {} in `{}`", fields.len(), shortened(line));
        };
        let value: f32 = field("rating", value)?;
        ensure!(value.is_finite(), "expected a finite rating, got {value}");
        Ok((field("user", user)?, field("item", item)?, value, field("time", time)?))
    }
}

/// One field of a line.
fn field<T: FromStr>(what: &str, text: &str) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    text.parse().with_context(|| format!("the {what} is not a number: `{}`", shortened(text)))
}

/// What an error message quotes of a line, which may be of any length where the file is of another kind.
fn shortened(text: &str) -> String {
    text.chars().take(60).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &[u8]) -> Result<Ratings> {
        Ratings::parse("file", text)
    }

    #[test]
    fn the_three_forms_say_the_same() -> Result<()> {
        let tabs = parse(b"196\t-242\t3\t881250949\n7\t-242\t5\t1\n")?;
        let colons = parse(b"196::-242::3::881250949\r\n7::-242::5::1")?;
        let csv = parse(b"userId,movieId,rating,timestamp\n196,-242,3.0,881250949\n7,-242,5.0,1\n")?;
        let first = Rating { user: 0, item: 0, value: 3.0, time: 881_250_949 };
        let second = Rating { user: 1, item: 0, value: 5.0, time: 1 };
        for ratings in [tabs, colons, csv] {
            assert_eq!((ratings.list.as_slice(), ratings.users, ratings.items), ([first, second].as_slice(), 2, 1));
        }
        Ok(())
    }

    #[test]
    fn errors_name_file_and_line() {
        for (text, expected) in [
            ("", "file: there are no ratings"),
            ("userId,movieId,rating,timestamp\n", "file: there are no ratings"),
            ("user,item\n", "file:1: expected ratings separated by tabs or `::`, or the header"),
            ("1\t2\t3\t4\n1\t3\t4\n", r#"file:2: expected 4 fields separated by "\t", got 3 in `1"#),
            ("1::2::3::4\n1::x::3::4\n", "file:2: the item is not a number: `x`"),
            ("1::2::3::4\n\n", r#"file:2: expected 4 fields separated by "::", got 1 in ``"#),
            ("userId,movieId,rating,timestamp\n1,2,NaN,4\n", "file:2: expected a finite rating, got NaN"),
            ("userId,movieId,rating,timestamp\n1,2,1e39,4\n", "file:2: expected a finite rating, got inf"),
            (
                "userId,movieId,rating,timestamp\n1,2,3,4\n1,3,3,4\n1,2,5,6\n",
                "file:4: this user has rated this item before, on line 2",
            ),
        ] {
            let error = parse(text.as_bytes()).expect_err(text);
            assert!(format!("{error:#}").starts_with(expected), "{error:#}");
        }
        let error = parse(b"1\t2\t3\t4\n\xff\n").expect_err("no text");
        assert!(format!("{error:#}").starts_with("file:2: "), "{error:#}");
    }
}
