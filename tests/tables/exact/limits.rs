//! Settings whose work or memory would have no bound, and calls that fail before anything catches up.

use candle_adamax::{Adamax, GroupSettings, ParamGroup, ParamsAdamax, WeightDecay};
use candle_core::{DType, Result};

use super::{exact, ones, table};
use crate::common::bits;
use crate::common::folder::Folder;

#[test]
fn betas_that_are_too_close_are_refused() -> Result<()> {
    let w = table(2, 1, DType::F32)?;
    for (beta1, beta2) in [(0.999, 0.999_001), (0.999, 0.999_000_1), (0.5, 0.500_000_000_000_000_1), (0.0999, 0.099_95)]
    {
        let params = ParamsAdamax { beta1, beta2, ..exact() };
        let error = Adamax::from_named([("w", w.clone())], params.clone()).unwrap_err().to_string();
        assert_eq!(
            error,
            format!(
                "Adamax: invalid `beta1`: expected a number further below `beta2`, {beta2}, for `sparse_update: Exact`: what \
                 a step leaves of its momentum has to vanish within 65536 updates, as it does for at most 0.99936 times \
                 `beta2`, got {beta1}"
            )
        );
        let mut optimizer = Adamax::from_named([("w", w.clone())], exact())?;
        assert!(optimizer.set_params(params).is_err());
        let group = GroupSettings { beta1: Some(beta1), beta2: Some(beta2), ..GroupSettings::new("default") };
        assert!(optimizer.set_group(group).is_err());
        let group = ParamGroup::new("g").beta1(beta1).beta2(beta2);
        assert!(optimizer.add_group(group).is_err());
        // As a hostile file would have it.
        let mut snapshot = optimizer.snapshot()?;
        (snapshot.params.beta1, snapshot.params.beta2) = (beta1, beta2);
        assert!(optimizer.restore(&snapshot).is_err());
        // Without `Exact` nothing depends on it.
        let lazy = ParamsAdamax { sparse_update: Default::default(), beta1, beta2, ..exact() };
        Adamax::from_named([("w", w.clone())], lazy)?.apply_gradients([(&w, &ones(0, 1, DType::F32)?)])?;
    }
    for (beta1, beta2) in [(0.999, 0.9999), (0.0, 0.0001), (0.99936 * 0.999_999, 0.999_999), (0.9, 0.999)] {
        let params = ParamsAdamax { beta1, beta2, ..exact() };
        let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
        for row in [0, 1, 1] {
            optimizer.apply_gradients([(&w, &ones(row, 1, DType::F32)?)])?;
        }
        optimizer.catch_up()?;
        // The ledger: 16 bytes an update of the window, and little more.
        assert!(optimizer.bytes().missed <= 8 + 16 * 65_536 + 1024, "{beta1}, {beta2}: {:?}", optimizer.bytes());
    }
    Ok(())
}

/// Calls that fail leave the next bits as they would have been.
#[test]
fn failing_saves_change_nothing() -> Result<()> {
    let folder = Folder::new();
    let nowhere = folder.file("nowhere").join("file");
    type Save = fn(&Adamax, &std::path::Path) -> candle_adamax::Result<()>;
    let order = |optimizer: &Adamax, path: &std::path::Path| optimizer.save_keras_legacy(path, &["w"]);
    let saves: [(bool, Save); 4] = [
        (false, |optimizer, path| optimizer.save(path)),
        (false, |optimizer, path| optimizer.save_keras(path)),
        (false, order),
        (true, |optimizer, path| optimizer.save_torch(path)),
    ];
    for (nth, (is_torch, save)) in saves.into_iter().enumerate() {
        let base = if is_torch { ParamsAdamax::pytorch() } else { ParamsAdamax::default() };
        for weight_decay in [WeightDecay::None, WeightDecay::Decoupled(0.1)] {
            let params = ParamsAdamax { sparse_update: exact().sparse_update, weight_decay, ..base.clone() };
            let w = table(4, 3, DType::F32)?;
            let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
            for row in [0, 1, 2, 2] {
                optimizer.apply_gradients([(&w, &ones(row, 3, DType::F32)?)])?;
            }
            let before = bits(&w);
            // No such folder; a folder in place of a file; and what the other framework cannot hold.
            assert!(save(&optimizer, &nowhere).is_err());
            assert!(save(&optimizer, folder.path()).is_err());
            if is_torch && weight_decay != WeightDecay::None {
                assert!(save(&optimizer, &folder.file("file")).is_err());
            }
            assert_eq!(bits(&w), before, "save {nth}, {weight_decay:?}");
            assert_eq!(std::fs::read_dir(folder.path())?.count(), 0, "nothing is left");
        }
    }
    Ok(())
}
