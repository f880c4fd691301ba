//! Random numbers, a stream of them for each purpose.

use rand::rngs::StdRng;

use crate::program;

/// What random numbers are for. Each purpose has a stream of its own, and each epoch, so that an epoch draws the same
/// numbers whether or not those before it ran in the same process.
#[derive(Clone, Copy)]
pub(crate) enum Stream {
    Split,
    Weights,
    Epoch(usize),
}

/// The random numbers of one purpose.
pub(crate) fn random(seed: u64, stream: Stream) -> StdRng {
    let stream = match stream {
        Stream::Split => 0,
        Stream::Weights => 1,
        Stream::Epoch(epoch) => 1 + epoch as u64,
    };
    program::random(&[seed, stream])
}
