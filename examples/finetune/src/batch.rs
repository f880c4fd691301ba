//! Batches of texts of about the same length, since the shorter ones are filled up to the longest.

use candle_core::{Device, Result, Tensor};
use rand::{rngs::StdRng, seq::SliceRandom};

use crate::tokenizer::Encoded;

/// Batches whose texts are sorted by length together.
const SORTED_TOGETHER: usize = 16;

/// Texts as tensors.
pub(crate) struct Batch {
    /// `[texts, tokens]`, u32.
    pub(crate) ids: Tensor,
    /// 1 for a token and 0 for what fills up; `[texts, tokens]`, f32.
    pub(crate) mask: Tensor,
    /// `[texts]`, u32.
    pub(crate) labels: Tensor,
}

/// Makes batches for one model.
pub(crate) struct Batcher {
    /// The token that fills up.
    pub(crate) padding: u32,
    pub(crate) device: Device,
    /// Where the embeddings of words want their ids: the crate's, whose rows the host sorts, in host memory.
    pub(crate) ids: Device,
}

impl Batcher {
    pub(crate) fn batch(&self, texts: &[&Encoded]) -> Result<Batch> {
        let longest = texts.iter().map(|text| text.ids.len()).max().unwrap_or(0);
        let shape = (texts.len(), longest);
        let filled = |text: &&Encoded| {
            let more = longest - text.ids.len();
            text.ids.iter().copied().chain(std::iter::repeat_n(self.padding, more)).collect::<Vec<_>>()
        };
        let ids: Vec<u32> = texts.iter().flat_map(filled).collect();
        let is_token = |text: &&Encoded| {
            let tokens = text.ids.len();
            (0..longest).map(move |place| if place < tokens { 1f32 } else { 0.0 })
        };
        let mask: Vec<f32> = texts.iter().flat_map(is_token).collect();
        let labels: Vec<u32> = texts.iter().map(|text| text.label).collect();
        Ok(Batch {
            ids: Tensor::from_vec(ids, shape, &self.ids)?,
            mask: Tensor::from_vec(mask, shape, &self.device)?,
            labels: Tensor::new(labels, &self.device)?,
        })
    }
}

/// Which texts are trained on in each step of one epoch, by their positions: each text once, at random, but with others
/// of its length. One step, which may be any of them, has fewer than `size` where they do not come out even.
pub(crate) fn epoch(texts: &[Encoded], size: usize, rng: &mut StdRng) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.shuffle(rng);
    for part in order.chunks_mut(size.saturating_mul(SORTED_TOGETHER)) {
        part.sort_by_key(|&index| texts[index].ids.len()); // stable, so that equal lengths stay shuffled
    }
    let mut batches: Vec<Vec<usize>> = order.chunks(size).map(<[usize]>::to_vec).collect();
    batches.shuffle(rng);
    batches
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn texts(lengths: impl Iterator<Item = usize>) -> Vec<Encoded> {
        lengths.map(|length| Encoded { label: (length % 3) as u32, ids: (1..=length as u32).collect() }).collect()
    }

    #[test]
    fn an_epoch_has_every_text_once_beside_others_of_its_length() {
        let texts = texts((0..1001).map(|i| 3 + i * 7 % 50));
        let batches = epoch(&texts, 8, &mut StdRng::seed_from_u64(1));
        let mut all = batches.concat();
        all.sort_unstable();
        assert_eq!(all, (0..1001).collect::<Vec<_>>());
        assert_eq!(batches.len(), 126);

        let filled = |batches: &[Vec<usize>]| -> usize {
            let length = |&index: &usize| texts[index].ids.len();
            batches.iter().map(|batch| batch.len() * batch.iter().map(length).max().unwrap_or(0)).sum()
        };
        let mut shuffled: Vec<usize> = (0..1001).collect();
        shuffled.shuffle(&mut StdRng::seed_from_u64(1));
        let unsorted: Vec<Vec<usize>> = shuffled.chunks(8).map(<[usize]>::to_vec).collect();
        let tokens: usize = texts.iter().map(|text| text.ids.len()).sum();
        assert!(filled(&batches) - tokens < (filled(&unsorted) - tokens) / 4);

        assert_eq!(batches, epoch(&texts, 8, &mut StdRng::seed_from_u64(1)));
        assert_ne!(batches, epoch(&texts, 8, &mut StdRng::seed_from_u64(2)));
    }

    #[test]
    fn short_texts_are_filled_up_and_masked() -> Result<()> {
        let texts = texts([3, 1].into_iter());
        let batcher = Batcher { padding: 9, device: Device::Cpu, ids: Device::Cpu };
        let batch = batcher.batch(&texts.iter().collect::<Vec<_>>())?;
        assert_eq!(batch.ids.to_vec2::<u32>()?, [[1, 2, 3], [1, 9, 9]]);
        assert_eq!(batch.mask.to_vec2::<f32>()?, [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]);
        assert_eq!(batch.labels.to_vec1::<u32>()?, [0, 1]);
        Ok(())
    }
}
