//! Numbers that look random and are the same everywhere.

/// Uniform numbers in [0, 1).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Of either sign, and of a magnitude between 10^from and 10^to.
    pub(crate) fn signed(&mut self, from: f64, to: f64) -> f64 {
        let magnitude = 10f64.powf(from + (to - from) * self.next());
        if self.next() < 0.5 { -magnitude } else { magnitude }
    }

    /// So many of these.
    pub(crate) fn values(&mut self, n: usize, from: f64, to: f64) -> Vec<f64> {
        (0..n).map(|_| self.signed(from, to)).collect()
    }

    /// One of these, or zero once in twenty times.
    pub(crate) fn gradient(&mut self, from: f64, to: f64) -> f32 {
        let value = self.signed(from, to);
        if self.next() < 0.05 { 0.0 } else { value as f32 }
    }

    /// Some rows, of which the first are there often and the last hardly ever: Pareto's law.
    pub(crate) fn rows(&mut self, rows: usize) -> Vec<u32> {
        let mut drawn: Vec<u32> = (0..4)
            .map(|_| ((1.0 - self.next()).powf(-1.0 / 1.16) - 1.0) * 3.0)
            .filter(|row| *row < rows as f64)
            .map(|row| row as u32)
            .chain([0])
            .collect();
        drawn.sort_unstable();
        drawn.dedup();
        drawn
    }
}

/// Numbers from -1 to 1.
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let mut next = || {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as i64 as f64 / 2f64.powi(63)
    };
    (0..n).map(|_| next()).collect()
}

/// Numbers 0 to n - 1 in another order.
pub(crate) fn shuffled(seed: u64, n: usize) -> Vec<usize> {
    let keys = noise(seed, n);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| keys[a].total_cmp(&keys[b]));
    order
}
