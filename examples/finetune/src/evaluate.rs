//! How good a model is on the texts that were kept.

use anyhow::Result;
use candle_core::D;
use candle_nn::{loss, ops};
use serde::{Deserialize, Serialize};

use crate::batch::Batcher;
use crate::model::{Classifier, Pass};
use crate::tokenizer::Encoded;

/// Texts that are classified at a time.
const BATCH: usize = 64;

/// How good a model is after so many steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Evaluation {
    pub(crate) step: usize,
    /// The mean cross-entropy.
    pub(crate) loss: f64,
    /// How many texts of each class, a row, were taken for which, a column.
    pub(crate) confusion: Vec<Vec<usize>>,
}

impl Evaluation {
    /// The share of the texts whose class was found.
    pub(crate) fn accuracy(&self) -> f64 {
        let right: usize = self.confusion.iter().enumerate().map(|(class, row)| row[class]).sum();
        right as f64 / self.confusion.iter().flatten().sum::<usize>() as f64
    }
}

/// Classifies `texts`.
pub(crate) fn evaluate(
    model: &Classifier,
    batcher: &Batcher,
    texts: &[Encoded],
    labels: usize,
    step: usize,
) -> Result<Evaluation> {
    let mut sorted: Vec<&Encoded> = texts.iter().collect();
    sorted.sort_by_key(|text| text.ids.len());
    let (mut sum, mut confusion) = (0.0, vec![vec![0; labels]; labels]);
    for texts in sorted.chunks(BATCH) {
        let batch = batcher.batch(texts)?;
        let logits = model.forward(&batch, Pass::Evaluation)?.detach();
        let loss = loss::nll(&ops::log_softmax(&logits, D::Minus1)?, &batch.labels)?.to_scalar::<f32>()?;
        sum += f64::from(loss) * texts.len() as f64;
        for (text, predicted) in texts.iter().zip(logits.argmax(D::Minus1)?.to_vec1::<u32>()?) {
            confusion[text.label as usize][predicted as usize] += 1;
        }
    }
    Ok(Evaluation { step, loss: sum / texts.len() as f64, confusion })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accuracy_is_the_share_of_the_diagonal() {
        let evaluation = Evaluation { step: 1, loss: 0.5, confusion: vec![vec![5, 1], vec![2, 2]] };
        assert_eq!(evaluation.accuracy(), 0.7);
    }
}
