//! Ratings, read from a file of MovieLens in any of its three forms, with the ids made dense.

use std::{collections::HashMap, fs::File, io::BufRead, io::BufReader, path::Path};

use anyhow::{Context, Result, bail, ensure};

use crate::form::{Form, Line};
use crate::text::for_each_line;

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
        let (mut list, mut form, mut fractions) = (Vec::new(), None, Vec::new());
        // The lines that have no rating, which are few.
        let mut others = Vec::new();
        for_each_line(name, text, |number, line| {
            let form = match form {
                Some(form) => form,
                None => {
                    let (found, is_header) = Form::of(line)?;
                    form = Some(found);
                    if is_header {
                        return Ok(());
                    }
                    found
                }
            };
            let Line { user, item, value, time: (time, fraction) } = form.parse(line)?;
            while list.len() + others.len() + 1 < number {
                others.push(list.len() + others.len() + 1);
            }
            if fraction > 0.0 {
                fractions.push((list.len(), fraction));
            }
            list.push(Rating { user: users.number(&user), item: items.number(&item), value, time });
            Ok(())
        })?;
        ensure!(!list.is_empty(), "{name}: there are no ratings in this file");
        if !fractions.is_empty() {
            rank_times(&mut list, &fractions);
        }
        let ratings = Self { list, users: users.len(), items: items.len() };
        if let Some((first, second)) = ratings.find_repeated() {
            let line = |index| others.iter().fold(index + 1, |line, &other| line + usize::from(other <= line));
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

/// Replaces times by their ranks, where the times at some positions have these fractions of a second beside them.
fn rank_times(list: &mut [Rating], fractions: &[(usize, f64)]) {
    let mut times: Vec<(i64, f64, usize)> =
        list.iter().enumerate().map(|(index, rating)| (rating.time, 0.0, index)).collect();
    fractions.iter().for_each(|&(index, fraction)| times[index].1 = fraction);
    times.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let mut rank = 0;
    for (place, &(time, fraction, index)) in times.iter().enumerate() {
        rank += i64::from(place > 0 && (times[place - 1].0, times[place - 1].1) != (time, fraction));
        list[index].time = rank;
    }
}

/// Numbers from 0 for ids, in the order in which they turn up. An id is a whole number or any other text.
#[derive(Default)]
struct Numbering {
    numbers: HashMap<i64, u32>,
    texts: HashMap<String, u32>,
}

impl Numbering {
    fn number(&mut self, id: &str) -> u32 {
        let next = self.len() as u32;
        if let Ok(number) = id.parse() {
            return *self.numbers.entry(number).or_insert(next);
        }
        if !self.texts.contains_key(id) {
            self.texts.insert(id.to_owned(), next);
        }
        self.texts[id]
    }

    fn len(&self) -> usize {
        self.numbers.len() + self.texts.len()
    }
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
    fn files_of_other_systems_say_the_same() -> Result<()> {
        let plain = parse(b"196\t242\t3\t881250949\n7\t242\t5\t1\n")?;
        for text in [
            "\u{feff}196\t242\t3\t881250949\r\n7\t242\t5\t1\r\n\r\n",
            "196\t242\t3\t881250949\r7\t242\t5\t1",
            "\u{feff}userId,movieId,rating,timestamp\n196,242,3.0,881250949.0\n7,242,5,1e0\n",
            "\"userId\",\"movieId\",\"rating\",\"timestamp\"\n\"196\",\"242\",\"3\",\"881250949\"\n7,242,5,1\n",
            "\nUserID::MovieID::Rating::Timestamp\n196::242::3::8.81250949e8\n7::242::5::1\n\n",
            "196,242,3,881250949\n7,242,5,1\n",
        ] {
            let ratings = parse(text.as_bytes()).with_context(|| text.to_owned())?;
            assert_eq!((ratings.fingerprint(), ratings.list), (plain.fingerprint(), plain.list.clone()), "{text:?}");
        }
        Ok(())
    }

    #[test]
    fn ids_are_numbers_of_any_size_and_texts() -> Result<()> {
        let ids = [
            "9223372036854775807",
            "9223372036854775808",
            "18446744073709551615",
            "99999999999999999999",
            "-7",
            "b07-é",
            "0000013714",
            "13714",
        ];
        let text: String = ids.iter().map(|id| format!("{id}\t1\t3\t4\n")).collect();
        let error = parse(text.as_bytes()).expect_err("the last two are the same number").to_string();
        assert_eq!(error, "file:8: this user has rated this item before, on line 7");
        let text: String =
            ids[..7].iter().flat_map(|id| [format!("{id}\t1\t3\t4\n"), format!("{id}\t2\t3\t4\n")]).collect();
        let ratings = parse(text.as_bytes())?;
        assert_eq!((ratings.users, ratings.items), (7, 2));
        assert!(ratings.list.iter().enumerate().all(|(index, rating)| rating.user as usize == index / 2));
        Ok(())
    }

    #[test]
    fn fractions_of_seconds_keep_their_order() -> Result<()> {
        let times = ["978301000.75", "978301000", "978301000.25", "978300999.5", "978301000.75", "-1e9", "978301001"];
        let text: String = times.iter().enumerate().map(|(item, time)| format!("1,{item},3,{time}\n")).collect();
        let ranks: Vec<i64> = parse(text.as_bytes())?.list.iter().map(|rating| rating.time).collect();
        assert_eq!(ranks, [4, 2, 3, 1, 4, 0, 5]);
        Ok(())
    }

    #[test]
    fn errors_name_file_and_line() {
        for (text, expected) in [
            ("", "file: there are no ratings"),
            ("userId,movieId,rating,timestamp\n", "file: there are no ratings"),
            ("user,item\n", "file:1: expected ratings separated by tabs or `::`, or the header"),
            ("1\t2\t3\t4\n1\t3\t4\n", r#"file:2: expected 4 fields separated by "\t", got 3 in `1"#),
            ("1::2::3::4\n1::::3::4\n", "file:2: the item is missing in `1::::3::4`"),
            ("1::2::3::4\n1::5::x::4\n", "file:2: the rating is not a number: `x`"),
            ("1::2::3::4\n\n1::3\n", r#"file:3: expected 4 fields separated by "::", got 2 in `1::3`"#),
            ("1::2::3::4\n1::3::3::1e19\n", "file:2: the time is too large for 64 bits: `1e19`"),
            ("userId,movieId,rating,timestamp\n1,2,NaN,4\n", "file:2: expected a finite rating, got NaN"),
            ("userId,movieId,rating,timestamp\n1,2,1e39,4\n", "file:2: expected a finite rating, got inf"),
            (
                "userId,movieId,rating,timestamp\n1,2,3,4\n1,3,3,4\n1,2,5,6\n",
                "file:4: this user has rated this item before, on line 2",
            ),
            ("1,2,3,4\n\n\n1,3,3,4\n\n1,2,5,6\n", "file:6: this user has rated this item before, on line 1"),
        ] {
            let error = parse(text.as_bytes()).expect_err(text);
            assert!(format!("{error:#}").starts_with(expected), "{error:#}");
        }
        let error = parse(b"1\t2\t3\t4\n\xff\n").expect_err("no text");
        assert!(format!("{error:#}").starts_with("file:2: "), "{error:#}");
    }
}
