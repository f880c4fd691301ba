//! Passes over rows of numbers, as loops that the compiler turns into vector instructions.
//!
//! They are macros, so that the compiler sees each loop as if it had been written out. Sums have a fixed number of
//! parts, whatever the machine's vectors are: the bits are the same on all machines.

use super::real::Real;

/// The number of sums into which a row is added up.
pub(super) const LANES: usize = 64;

/// `map!(out, x in row, ... => value)` writes to each number of `out` a value of the numbers of the rows, which are as
/// long.
macro_rules! map {
    ($out:expr, $($x:ident in $row:expr),+ => $value:expr) => {{
        let out: &mut [_] = $out;
        let len = out.len();
        $(let $x = &$row[..len];)+
        for i in 0..len {
            $(let $x = $x[i];)+
            out[i] = $value;
        }
    }};
}

/// `update!(y in out, x in row, ... => value)` replaces each number `y` of `out` by a value of it and of the numbers of
/// the rows, which are as long.
macro_rules! update {
    ($y:ident in $out:expr $(, $x:ident in $row:expr)* => $value:expr) => {{
        let out: &mut [_] = $out;
        let len = out.len();
        $(let $x = &$row[..len];)*
        for i in 0..len {
            $(let $x = $x[i];)*
            let $y = out[i];
            out[i] = $value;
        }
    }};
}

/// `sums!(x in row, ... => a: value, ...)` is the sum of each value of the numbers of the rows, which are as long.
macro_rules! sums {
    ($($x:ident in $row:expr),+ => $($sum:ident: $value:expr),+) => {{
        let len = [$($row.len()),+][0];
        $(let $x = &$row[..len];)+
        $(let mut $sum = [Real::ZERO; lanes::LANES];)+
        let mut at = 0;
        while at < len {
            let n = lanes::LANES.min(len - at);
            $(let $x = &$x[at..][..n];)+
            {
                $(let $sum = &mut $sum[..n];)+
                for i in 0..n {
                    $(let $x = $x[i];)+
                    $($sum[i] += $value;)+
                }
            }
            at += n;
        }
        ($(lanes::sum(&$sum)),+)
    }};
}

pub(super) use {map, sums, update};

/// The largest number; one that is not NaN where there is any.
#[inline(always)]
pub(super) fn max<W: Real>(row: &[W]) -> W {
    let mut lanes = [W::NEG_INFINITY; LANES];
    for row in row.chunks(LANES) {
        let lanes = &mut lanes[..row.len()];
        update!(max in lanes, x in row => x.larger(max));
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = lanes[i].larger(lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// The sum of all lanes.
#[inline(always)]
pub(super) fn sum<W: Real>(lanes: &[W; LANES]) -> W {
    let mut lanes = *lanes;
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}
