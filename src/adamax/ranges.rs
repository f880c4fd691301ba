//! Ascending numbers as ranges.

use std::ops::Range;

/// Ascending numbers as ranges.
pub(super) fn ranges(numbers: &[usize]) -> Vec<Range<usize>> {
    numbers.chunk_by(|a, b| a + 1 == *b).map(|run| run[0]..run[run.len() - 1] + 1).collect()
}

/// The numbers that are in both of two ascending lists of ranges.
pub(super) fn intersection(a: &[Range<usize>], b: &[Range<usize>]) -> Vec<Range<usize>> {
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    let mut both = Vec::new();
    while let (Some(first), Some(second)) = (a.peek(), b.peek()) {
        let common = first.start.max(second.start)..first.end.min(second.end);
        let first_ends = first.end <= second.end;
        if !common.is_empty() {
            both.push(common);
        }
        if first_ends {
            a.next()
        } else {
            b.next()
        };
    }
    both
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_ranges_and_meet() {
        assert!(ranges(&[]).is_empty());
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8, 11]), [0..3, 5..6, 7..9, 11..12]);
        let of = |bits: u32| ranges(&(0..8).filter(|bit| bits >> bit & 1 == 1).collect::<Vec<_>>());
        for a in 0..256 {
            for b in [0, 1, 0b1111_0000, 0b1010_1010, 0b0011_1001, 255] {
                assert_eq!(intersection(&of(a), &of(b)), of(a & b), "{a:b} {b:b}");
            }
        }
    }
}
