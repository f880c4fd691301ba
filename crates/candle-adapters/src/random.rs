//! Random numbers that depend on a seed and a name alone, not on the order in which they are asked for.

use candle_core::Shape;
use candle_nn::Init;
use candle_nn::init::NormalOrUniform;

/// The generator `SplitMix64` (Steele, Lea, Flood, 2014).
pub(crate) struct Stream(u64);

impl Stream {
    /// The stream of one purpose: of a seed, a number and a name.
    pub(crate) fn new(seed: u64, number: u64, name: &str) -> Self {
        // FNV-1a, whose low quality is mended by the generator's mixing.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let mut stream = Self(hash);
        for part in [seed, number] {
            stream.0 = stream.next() ^ part;
        }
        stream
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in [0, 1) with 53 random bits.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn uniform(&mut self, count: usize, lo: f64, up: f64) -> Vec<f64> {
        (0..count).map(|_| lo + (up - lo) * self.unit()).collect()
    }

    /// Numbers of a normal distribution, by Box and Muller's method.
    pub(crate) fn normal(&mut self, count: usize, mean: f64, deviation: f64) -> Vec<f64> {
        let mut draw = || {
            let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
            mean + deviation * radius * (std::f64::consts::TAU * self.unit()).cos()
        };
        (0..count).map(|_| draw()).collect()
    }

    /// The values that candle gives a new variable, but reproducible.
    pub(crate) fn init(&mut self, init: Init, shape: &Shape) -> Vec<f64> {
        let count = shape.elem_count();
        match init {
            Init::Const(value) => vec![value; count],
            Init::Randn { mean, stdev } => self.normal(count, mean, stdev),
            Init::Uniform { lo, up } => self.uniform(count, lo, up),
            Init::Kaiming { dist, fan, non_linearity } => {
                let deviation = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
                match dist {
                    NormalOrUniform::Normal => self.normal(count, 0.0, deviation),
                    NormalOrUniform::Uniform => {
                        let bound = 3f64.sqrt() * deviation;
                        self.uniform(count, -bound, bound)
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_distributions() {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let uniform = Stream::new(1, 0, "x").uniform(40_000, -0.5, 0.5);
        assert!(mean(&uniform).abs() < 5e-3);
        assert!(uniform.iter().all(|value| (-0.5..0.5).contains(value)));
        let normal = Stream::new(1, 0, "x").normal(40_000, 2.0, 3.0);
        let centre = mean(&normal);
        let variance = mean(&normal.iter().map(|value| (value - centre).powi(2)).collect::<Vec<_>>());
        assert!((centre - 2.0).abs() < 0.05 && (variance.sqrt() - 3.0).abs() < 0.05, "{centre} {variance}");
    }

    #[test]
    fn streams_differ_by_seed_number_and_name() {
        let first = |seed, number, name| Stream::new(seed, number, name).next();
        let all = [first(0, 0, "a"), first(1, 0, "a"), first(0, 1, "a"), first(1, 1, "a"), first(0, 0, "b")];
        for (index, value) in all.iter().enumerate() {
            assert!(!all[..index].contains(value), "{all:?}");
        }
        assert_eq!(first(3, 4, "a"), first(3, 4, "a"));
    }
}
