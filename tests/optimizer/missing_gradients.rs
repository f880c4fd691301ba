//! Variables without a gradient: which updates are refused, by which text, and the report of the others.

use candle_adamax::{
    Adamax, Clip, ErrorKind, GradScaler, GroupLr, GroupSettings, LinearWarmup, LossScale, MissingGradients, ParamGroup,
    ParamsAdamax, SparseGrad, Table,
};
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{Init, LayerNorm, Linear, Module, VarBuilder, VarMap, layer_norm, linear, ops};

use crate::common::folder::Folder;
use crate::common::{Fingerprint, KERNELS, noise, tensor, values, var};

fn names<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    names.collect()
}

/// `x` as a variable of one element.
fn scalar(x: f64) -> Var {
    var(&[x], &[1], DType::F32)
}

/// Named variables of one element each.
fn scalars(names: &[&str]) -> Vec<(String, Var)> {
    names.iter().enumerate().map(|(i, name)| ((*name).to_owned(), scalar(i as f64))).collect()
}

/// A call with a gradient of 1 for the variables at `positions`.
fn give(optimizer: &mut Adamax, vars: &[(String, Var)], positions: &[usize]) -> candle_adamax::Result<()> {
    let grad = tensor(&[1.0], &[1], DType::F32);
    optimizer.apply_gradients(positions.iter().map(|&position| (&vars[position].1, &grad))).map(drop)
}

/// Makes sure that a call is refused, with so many of so many variables, and has changed nothing; gives its text.
#[track_caller]
fn refused(
    optimizer: &mut Adamax,
    vars: &[(String, Var)],
    call: impl FnOnce(&mut Adamax) -> candle_adamax::Result<()>,
    counts: (usize, usize),
) -> String {
    let before = Fingerprint::of(optimizer, vars);
    let report = optimizer.report().to_string();
    let error = call(optimizer).unwrap_err();
    let ErrorKind::MissingGradients { with_gradient, vars: all, missing, .. } = error.kind() else {
        panic!("{error}");
    };
    assert_eq!((*with_gradient, *all), counts);
    assert_eq!(missing.len(), all - with_gradient);
    assert_eq!(Fingerprint::of(optimizer, vars), before);
    assert_eq!(optimizer.report().to_string(), report);
    optimizer.restore(&optimizer.snapshot().unwrap()).unwrap();
    error.to_string()
}

// === A transformer ===

const HIDDEN: usize = 8;

/// One layer of BERT, of 16 variables.
struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    norm: LayerNorm,
    inner: Linear,
    outer: Linear,
    last_norm: LayerNorm,
}

/// A small BERT as candle-transformers has it, with a head: 103 variables.
struct Bert {
    embeddings: Vec<candle_nn::Embedding>,
    norm: LayerNorm,
    layers: Vec<Layer>,
    head: Linear,
    /// Whether operations without a backward pass are avoided.
    trains: bool,
}

impl Bert {
    fn new(vb: VarBuilder<'_>, trains: bool) -> Result<Self> {
        let layer = |vb: VarBuilder<'_>| -> Result<Layer> {
            Ok(Layer {
                query: linear(HIDDEN, HIDDEN, vb.pp("attention.self.query"))?,
                key: linear(HIDDEN, HIDDEN, vb.pp("attention.self.key"))?,
                value: linear(HIDDEN, HIDDEN, vb.pp("attention.self.value"))?,
                out: linear(HIDDEN, HIDDEN, vb.pp("attention.output.dense"))?,
                norm: layer_norm(HIDDEN, 1e-12, vb.pp("attention.output.LayerNorm"))?,
                inner: linear(HIDDEN, 2 * HIDDEN, vb.pp("intermediate.dense"))?,
                outer: linear(2 * HIDDEN, HIDDEN, vb.pp("output.dense"))?,
                last_norm: layer_norm(HIDDEN, 1e-12, vb.pp("output.LayerNorm"))?,
            })
        };
        let of = vb.pp("bert.embeddings");
        let embedding = |rows, name| -> Result<candle_nn::Embedding> {
            let init = Init::Randn { mean: 0.0, stdev: 1.0 };
            Ok(candle_nn::Embedding::new(of.pp(name).get_with_hints((rows, HIDDEN), "weight", init)?, HIDDEN))
        };
        Ok(Self {
            embeddings: vec![
                embedding(20, "word_embeddings")?,
                embedding(6, "position_embeddings")?,
                embedding(2, "token_type_embeddings")?,
            ],
            norm: layer_norm(HIDDEN, 1e-12, of.pp("LayerNorm"))?,
            layers: (0..6).map(|i| layer(vb.pp(format!("bert.encoder.layer.{i}")))).collect::<Result<_>>()?,
            head: linear(HIDDEN, 2, vb.pp("head"))?,
            trains,
        })
    }

    fn normed(&self, norm: &LayerNorm, x: &Tensor) -> Result<Tensor> {
        match (self.trains, norm.bias()) {
            (true, Some(bias)) => ops::layer_norm_slow(x, norm.weight(), bias, norm.eps() as f32),
            _ => norm.forward(x),
        }
    }

    fn loss(&self) -> Result<Tensor> {
        let ids = Tensor::new(&[[3u32, 1, 4, 1, 5, 9], [2, 7, 18, 2, 8, 1]], &Device::Cpu)?;
        let positions = Tensor::new(&[[0u32, 1, 2, 3, 4, 5]; 2], &Device::Cpu)?;
        let types = Tensor::new(&[[0u32, 0, 0, 1, 1, 1]; 2], &Device::Cpu)?;
        let [words, places, kinds] = &self.embeddings[..] else { unreachable!() };
        let x = (words.forward(&ids)? + places.forward(&positions)?)? + kinds.forward(&types)?;
        let mut x = self.normed(&self.norm, &x?)?;
        for layer in &self.layers {
            let scores = layer.query.forward(&x)?.matmul(&layer.key.forward(&x)?.t()?)?;
            let shares = if self.trains { ops::softmax(&scores, D::Minus1)? } else { ops::softmax_last_dim(&scores)? };
            let attended = layer.out.forward(&shares.matmul(&layer.value.forward(&x)?)?)?;
            x = self.normed(&layer.norm, &(x + attended)?)?;
            let inner = layer.outer.forward(&layer.inner.forward(&x)?.gelu()?)?;
            x = self.normed(&layer.last_norm, &(x + inner)?)?;
        }
        candle_nn::loss::cross_entropy(&self.head.forward(&x.mean(1)?)?, &Tensor::new(&[0u32, 1], &Device::Cpu)?)
    }
}

/// A BERT, its `VarMap`, and an optimizer of it with these settings.
fn bert(trains: bool, params: ParamsAdamax) -> (Bert, VarMap, Adamax) {
    let varmap = VarMap::new();
    let bert = Bert::new(VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu), trains).unwrap();
    let mut vars = vars_of(&varmap);
    vars.sort_by(|a, b| a.0.cmp(&b.0));
    for (seed, (_, var)) in vars.iter().enumerate() {
        var.set(&tensor(&noise(seed as u64, var.elem_count()), var.dims(), DType::F32)).unwrap();
    }
    let optimizer = Adamax::from_varmap(&varmap, params).unwrap();
    (bert, varmap, optimizer)
}

fn vars_of(varmap: &VarMap) -> Vec<(String, Var)> {
    varmap.data().lock().unwrap().iter().map(|(name, var)| (name.clone(), var.clone())).collect()
}

#[test]
fn a_model_that_is_cut_off_is_an_error_of_its_first_step() {
    let (mut bert, varmap, mut optimizer) = bert(false, ParamsAdamax::default());
    let grads = bert.loss().unwrap().backward().unwrap();
    let vars = vars_of(&varmap);
    // By the trait, as a training loop calls it: the text is the same.
    let before = Fingerprint::of(&optimizer, &vars);
    let text = optimizer.step(&grads).unwrap_err().to_string();
    assert_eq!(Fingerprint::of(&optimizer, &vars), before);
    let (head, hints) = text.split_once("no gradient passes").unwrap();
    assert_eq!(
        head,
        "Adamax: 2 of 103 vars had a gradient, expected at least half of them, in this update or an earlier one\n\
         without one: `bert.embeddings.LayerNorm.bias`, `bert.embeddings.LayerNorm.weight`, \
         `bert.embeddings.position_embeddings.weight`, `bert.embeddings.token_type_embeddings.weight`, \
         `bert.embeddings.word_embeddings.weight` and 96 more\n"
    );
    assert_eq!(
        hints,
        " these operations of candle, nor reaches what is before them: `LayerNorm`, `RmsNorm`, \
         `softmax_last_dim`, `rope`, `rope_i`, `rope_thd`, `sdpa`, `flash_attn` on the CPU, `QMatMul`\n\
         `cargo run -p trainable-candle` writes a candle-nn that trains: see the guide's page \"Fine-tuning \
         candle-transformers\", `candle_adamax::guide::fine_tuning`\n\
         where this is meant, set `missing_gradients: MissingGradients::Allow`"
    );
    // An update without any gradient has the same hints.
    let none = optimizer.step(&GradStore::default()).unwrap_err().to_string();
    let head = "Adamax: none of the 103 vars had a gradient: is the loss computed from them, through operations that \
                have a backward pass?\nno gradient passes";
    assert_eq!(none, format!("{head}{hints}"));
    let by_trait = optimizer.backward_step(&bert.loss().unwrap()).unwrap_err();
    assert_eq!(by_trait.to_string(), text);

    // The same optimizer goes on once the model is whole.
    bert.trains = true;
    let first = bert.loss().unwrap().to_scalar::<f32>().unwrap();
    for _ in 0..50 {
        optimizer.backward_step(&bert.loss().unwrap()).unwrap();
    }
    assert!(bert.loss().unwrap().to_scalar::<f32>().unwrap() < 0.9 * first);
    assert_eq!(optimizer.report().to_string(), "updated 103 of 103 vars, lr 1e-3");
    // A part that is lost later does not stop the run, and is reported.
    bert.trains = false;
    optimizer.backward_step(&bert.loss().unwrap()).unwrap();
    assert_eq!(optimizer.report().to_string(), "updated 2 of 103 vars, lr 1e-3");
    assert_eq!((optimizer.report().trained(), optimizer.report().missing_count()), (2, 101));
}

#[test]
fn a_head_alone_is_trained_where_that_is_meant() {
    let params = ParamsAdamax { missing_gradients: MissingGradients::Allow, ..Default::default() };
    let (model, _, mut optimizer) = bert(false, params);
    optimizer.backward_step(&model.loss().unwrap()).unwrap();
    assert_eq!(optimizer.report().to_string(), "updated 2 of 103 vars, lr 1e-3");

    // Or the head is all that the optimizer has.
    let (model, varmap, _) = bert(false, ParamsAdamax::default());
    let is_head = |name: &str, _: &Var| name.starts_with("head.");
    let mut optimizer = Adamax::from_varmap_where(&varmap, is_head, ParamsAdamax::default()).unwrap();
    optimizer.backward_step(&model.loss().unwrap()).unwrap();
    assert_eq!(optimizer.report().to_string(), "updated 2 of 2 vars, lr 1e-3");
}

// === Half ===

#[test]
fn half_of_the_variables_is_enough() {
    for kernel in KERNELS {
        let vars = scalars(&["a", "b", "c", "d", "e"]);
        let mut optimizer = Adamax::from_named(vars.clone(), ParamsAdamax::default()).unwrap();
        optimizer.set_kernel(kernel).unwrap();
        let text = refused(&mut optimizer, &vars, |optimizer| give(optimizer, &vars, &[0, 1]), (2, 5));
        assert!(text.contains("without one: `c`, `d`, `e`\n"), "{text}");
        give(&mut optimizer, &vars, &[0, 1, 2]).unwrap();
        // From now on any of them will do.
        give(&mut optimizer, &vars, &[4]).unwrap();

        let four = &vars[..4];
        let mut optimizer = Adamax::from_named(four.to_vec(), ParamsAdamax::default()).unwrap();
        refused(&mut optimizer, four, |optimizer| give(optimizer, four, &[3]), (1, 4));
        give(&mut optimizer, four, &[3, 0]).unwrap();
    }
}

#[test]
fn tasks_that_alternate_add_up() {
    let vars = scalars(&["a", "b", "c", "d", "shared"]);
    let params = ParamsAdamax { missing_gradients: MissingGradients::Allow, ..Default::default() };
    let mut optimizer = Adamax::from_named(vars.clone(), params).unwrap();
    give(&mut optimizer, &vars, &[0, 4]).unwrap();
    optimizer.set_params(ParamsAdamax::default()).unwrap();
    // The update before counts, whatever the setting was.
    refused(&mut optimizer, &vars, |optimizer| give(optimizer, &vars, &[0, 4]), (2, 5));
    give(&mut optimizer, &vars, &[1, 4]).unwrap();
    give(&mut optimizer, &vars, &[0]).unwrap();
}

#[test]
fn variables_that_come_later_count() {
    let vars = scalars(&["a", "b", "c", "d", "e"]);
    let mut optimizer = Adamax::from_named(vars[..2].to_vec(), ParamsAdamax::default()).unwrap();
    give(&mut optimizer, &vars, &[0, 1]).unwrap();
    for (name, var) in &vars[2..] {
        optimizer.add_var(name, var.clone()).unwrap();
    }
    refused(&mut optimizer, &vars, |optimizer| give(optimizer, &vars, &[0]), (2, 5));
    give(&mut optimizer, &vars, &[0, 2]).unwrap();
    // So does one that goes.
    optimizer.remove_var("a").unwrap();
    optimizer.remove_var("b").unwrap();
    refused(&mut optimizer, &vars[2..], |optimizer| give(optimizer, &vars, &[2]), (1, 3));
    optimizer.remove_var("d").unwrap();
    give(&mut optimizer, &vars, &[2]).unwrap();
}

#[test]
fn frozen_groups_do_not_count() {
    let vars = scalars(&["a", "b", "c", "d"]);
    let body = || ParamGroup::new("body").vars(vars[..3].to_vec());
    let head = || ParamGroup::new("head").vars(vars[3..].to_vec());
    for missing_gradients in [MissingGradients::Half, MissingGradients::Error] {
        let params = ParamsAdamax { missing_gradients, ..Default::default() };
        for frozen in [body().lr(0.0), body().lr_factor(0.0)] {
            let mut optimizer = Adamax::from_groups([frozen, head()], params.clone()).unwrap();
            give(&mut optimizer, &vars, &[3]).unwrap();
            // Gradients of frozen variables are no others' substitute.
            refused(
                &mut optimizer_of_none(&vars, &params),
                &vars,
                |optimizer| give(optimizer, &vars, &[0, 1, 2]),
                (0, 1),
            );
            // Thawed, they count.
            optimizer.set_group(GroupSettings { lr: GroupLr::Inherit, ..GroupSettings::new("body") }).unwrap();
            refused(&mut optimizer, &vars, |optimizer| give(optimizer, &vars, &[3]), (1, 4));
        }
    }
    // A learning rate that is 0 for a while is not frozen: nor are all at the first step of a warm-up.
    let warmup = || LinearWarmup::new(0.0, 1e-3, 10);
    let mut optimizer = Adamax::from_groups([body().lr(warmup()), head()], ParamsAdamax::default()).unwrap();
    refused(&mut optimizer, &vars, |optimizer| give(optimizer, &vars, &[3]), (1, 4));
    let params = ParamsAdamax { lr: 0.0.into(), ..Default::default() };
    let mut optimizer = Adamax::from_groups([body(), head()], params).unwrap();
    refused(&mut optimizer, &vars, |optimizer| give(optimizer, &vars, &[3]), (1, 4));
    // An optimizer that is frozen as a whole needs nothing.
    let mut optimizer = Adamax::from_groups([body().lr(0.0), head().lr(0.0)], ParamsAdamax::default()).unwrap();
    give(&mut optimizer, &vars, &[3]).unwrap();
}

/// A frozen body, and a head that has had no gradient.
fn optimizer_of_none(vars: &[(String, Var)], params: &ParamsAdamax) -> Adamax {
    let groups =
        [ParamGroup::new("body").vars(vars[..3].to_vec()).lr(0.0), ParamGroup::new("head").vars(vars[3..].to_vec())];
    Adamax::from_groups(groups, params.clone()).unwrap()
}

#[test]
fn variables_without_names_are_told_by_their_shape() {
    let vars = vec![scalar(1.0), var(&[0.0; 6], &[2, 3], DType::F32), var(&[0.0; 4], &[4], DType::F32)];
    let mut optimizer = Adamax::new_lr(vars.clone(), 1e-3).unwrap();
    let error = optimizer.backward_step(&vars[0].sum_all().unwrap()).unwrap_err().to_string();
    assert!(error.contains("\nwithout one: `var.1 of shape [2, 3]`, `var.2 of shape [4]`\n"), "{error}");
}

// === Error ===

#[test]
fn every_variable_in_every_update() {
    let vars = scalars(&["a", "b", "c"]);
    let params = ParamsAdamax { missing_gradients: MissingGradients::Error, ..Default::default() };
    let mut optimizer = Adamax::from_named(vars.clone(), params).unwrap();
    give(&mut optimizer, &vars, &[0, 1, 2]).unwrap();
    let text = refused(&mut optimizer, &vars, |optimizer| give(optimizer, &vars, &[0, 2]), (2, 3));
    let head = "Adamax: 2 of 3 vars had a gradient, expected all of them, in every update \
                (`missing_gradients: Error`)\nwithout one: `b`\n";
    assert!(text.starts_with(head), "{text}");
    let none = optimizer.step(&GradStore::default()).unwrap_err().to_string();
    assert!(none.starts_with("Adamax: none of the 3 vars had a gradient"), "{none}");
    give(&mut optimizer, &vars, &[2, 1, 0]).unwrap();
    assert_eq!(optimizer.updates(), 2);
}

// === Accumulation, and calls that are skipped ===

#[test]
fn the_gradients_of_all_calls_of_an_update_count() {
    for kernel in KERNELS {
        for missing_gradients in [MissingGradients::Half, MissingGradients::Error] {
            let vars = scalars(&["a", "b", "c"]);
            let params = ParamsAdamax { missing_gradients, gradient_accumulation_steps: 3, ..Default::default() };
            let mut optimizer = Adamax::from_named(vars.clone(), params).unwrap();
            optimizer.set_kernel(kernel).unwrap();
            for position in [2, 0, 1] {
                give(&mut optimizer, &vars, &[position]).unwrap();
            }
            assert_eq!((optimizer.updates(), optimizer.report().trained()), (1, 3));
        }
    }
}

#[test]
fn a_refused_last_call_leaves_the_sums_alone() {
    for kernel in KERNELS {
        let vars = scalars(&["a", "b", "c"]);
        let params = ParamsAdamax { gradient_accumulation_steps: 3, ..Default::default() };
        let mut optimizer = Adamax::from_named(vars.clone(), params.clone()).unwrap();
        optimizer.set_kernel(kernel).unwrap();
        for _ in 0..2 {
            give(&mut optimizer, &vars, &[0]).unwrap();
        }
        for _ in 0..2 {
            refused(&mut optimizer, &vars, |optimizer| give(optimizer, &vars, &[0]), (1, 3));
            refused(&mut optimizer, &vars, |optimizer| optimizer.flush_gradients().map(drop), (1, 3));
            assert_eq!((optimizer.pending(), optimizer.calls(), optimizer.updates()), (2, 2, 0));
        }
        let mut other = Adamax::from_named(vars.clone(), params.clone()).unwrap();
        other.set_kernel(kernel).unwrap();
        other.restore(&optimizer.snapshot().unwrap()).unwrap();
        give(&mut optimizer, &vars, &[0, 1]).unwrap();
        // Each of three calls has given `a` 1, and one `b`.
        let mean = |name| values(&optimizer.state(name).unwrap().exp_avg)[0];
        assert!((mean("a") - 0.1).abs() < 1e-7 && (mean("b") - 0.1 / 3.0).abs() < 1e-7);
        // Or it is meant: the sums are as they were.
        let allowed = ParamsAdamax { missing_gradients: MissingGradients::Allow, ..params };
        other.set_params(allowed).unwrap();
        assert!(other.flush_gradients().unwrap());
        assert_eq!(other.report().to_string(), "updated 1 of 3 vars, lr 1e-3");
    }
}

#[test]
fn a_call_that_is_skipped_is_no_update() {
    for kernel in KERNELS {
        let vars = scalars(&["a", "b", "c"]);
        let params = ParamsAdamax { loss_scale: LossScale::Dynamic(GradScaler::default()), ..Default::default() };
        let mut optimizer = Adamax::from_named(vars.clone(), params).unwrap();
        optimizer.set_kernel(kernel).unwrap();
        let infinite = tensor(&[f64::INFINITY], &[1], DType::F32);
        optimizer.apply_gradients([(&vars[0].1, &infinite)]).unwrap();
        assert_eq!(optimizer.report().to_string(), "skipped: not finite, lr 1e-3");
        assert_eq!((optimizer.report().trained(), optimizer.loss_scale()), (0, 32768.0));
        // Its gradient does not count: `a` has had no update.
        refused(&mut optimizer, &vars, |optimizer| give(optimizer, &vars, &[1]), (1, 3));
        give(&mut optimizer, &vars, &[1, 2]).unwrap();
    }
}

// === Tables ===

#[test]
fn a_table_that_no_lookup_has_used_has_no_gradient() {
    let (weight, others) = (var(&noise(1, 8), &[4, 2], DType::F32), scalars(&["a", "b"]));
    let vars: Vec<_> = [("table".to_owned(), weight.clone())].into_iter().chain(others).collect();
    let table = Table::new(&weight).unwrap();
    let loss = |ids: &[u32]| {
        let rows = table.lookup(&Tensor::new(ids, &Device::Cpu).unwrap()).unwrap();
        (rows.sum_all().unwrap() + vars[1].1.sum_all().unwrap()).unwrap()
    };
    let mut optimizer = Adamax::from_named(vars.clone(), ParamsAdamax::default()).unwrap();
    let without = loss(&[]).backward().unwrap();
    refused(&mut optimizer, &vars, |optimizer| optimizer.step_rows(&without, []).map(drop), (1, 3));
    optimizer.backward_step(&loss(&[3, 1])).unwrap();
    assert_eq!(optimizer.report().trained(), 2);
    // Once half have been updated a batch may do without.
    optimizer.step(&without).unwrap();
    assert_eq!((optimizer.report().trained(), names(optimizer.report().missing())), (1, vec!["table"]));

    let params = ParamsAdamax { missing_gradients: MissingGradients::Error, ..Default::default() };
    let mut optimizer = Adamax::from_named(vars[..2].to_vec(), params).unwrap();
    optimizer.backward_step(&loss(&[0])).unwrap();
    refused(&mut optimizer, &vars[..2], |optimizer| optimizer.step_rows(&without, []).map(drop), (1, 2));
    // A gradient of no rows is one.
    let indices = Tensor::zeros(0, DType::U32, &Device::Cpu).unwrap();
    let none = SparseGrad { indices, values: Tensor::zeros((0, 2), DType::F32, &Device::Cpu).unwrap() };
    let grad = vars[1].1.ones_like().unwrap();
    optimizer
        .apply_gradients([(&weight, (&none).into()), (&vars[1].1, candle_adamax::Gradient::Dense(&grad))])
        .unwrap();
    assert_eq!(optimizer.report().trained(), 2);
}

// === Runs that stop and go on ===

#[test]
fn a_resumed_run_knows_who_has_been_updated() {
    let folder = Folder::new();
    let path = folder.file("state");
    let vars = scalars(&["a", "b", "c", "d"]);
    let mut optimizer = Adamax::from_named(vars.clone(), ParamsAdamax::default()).unwrap();
    give(&mut optimizer, &vars, &[0, 1]).unwrap();
    give(&mut optimizer, &vars, &[0]).unwrap();
    optimizer.save(&path).unwrap();
    let fresh = || Adamax::from_named(vars.clone(), ParamsAdamax::default()).unwrap();
    refused(&mut fresh(), &vars, |optimizer| give(optimizer, &vars, &[0]), (1, 4));
    let (mut restored, mut loaded) = (fresh(), fresh());
    restored.restore(&optimizer.snapshot().unwrap()).unwrap();
    loaded.load(&path).unwrap();
    for resumed in [&mut restored, &mut loaded] {
        give(resumed, &vars, &[2]).unwrap();
    }

    // Of a part of a checkpoint, those that it has: 2 of 5 now, and no other.
    let mut more = vars.clone();
    more.extend(scalars(&["e"]));
    let mut optimizer = Adamax::from_named(more.clone(), ParamsAdamax::default()).unwrap();
    optimizer.load_matching(&path).unwrap();
    refused(&mut optimizer, &more, |optimizer| give(optimizer, &more, &[0]), (2, 5));
    give(&mut optimizer, &more, &[4]).unwrap();
}

#[test]
fn a_run_that_resumes_in_an_accumulation_knows_the_sums() {
    let vars = scalars(&["a", "b", "c"]);
    let params = ParamsAdamax { gradient_accumulation_steps: 2, ..Default::default() };
    let mut optimizer = Adamax::from_named(vars.clone(), params.clone()).unwrap();
    give(&mut optimizer, &vars, &[0]).unwrap();
    let mut resumed = Adamax::from_named(vars.clone(), params).unwrap();
    resumed.restore(&optimizer.snapshot().unwrap()).unwrap();
    refused(&mut resumed, &vars, |optimizer| give(optimizer, &vars, &[0]), (1, 3));
    give(&mut resumed, &vars, &[2]).unwrap();
    assert_eq!(resumed.report().trained(), 2);
}

// === Settings ===

#[test]
fn the_setting_is_in_files_by_its_name() {
    for (setting, name) in
        [(MissingGradients::Error, "Error"), (MissingGradients::Half, "Half"), (MissingGradients::Allow, "Allow")]
    {
        assert_eq!(setting.to_string(), name);
        let params: ParamsAdamax = toml::from_str(&format!("missing_gradients = \"{name}\"")).unwrap();
        assert_eq!(params.missing_gradients, setting);
        let json = serde_json::to_value(&params).unwrap();
        assert_eq!(json["missing_gradients"], name);
        let optimizer = Adamax::from_named(scalars(&["a"]), params).unwrap().to_string();
        let is_shown = optimizer.contains(&format!(", missing gradients: {name}"));
        assert_eq!(is_shown, setting != MissingGradients::Half, "{optimizer}");
    }
    assert_eq!(ParamsAdamax::default().missing_gradients, MissingGradients::Half);
    let error = toml::from_str::<ParamsAdamax>("allow_no_gradients = true").unwrap_err().to_string();
    assert!(error.contains("allow_no_gradients"), "{error}");
}

// === The report in one line ===

#[test]
fn a_report_is_one_line() {
    let vars = scalars(&["a", "b"]);
    let allow = ParamsAdamax { lr: 4e-4.into(), missing_gradients: MissingGradients::Allow, ..Default::default() };
    let line = |optimizer: &Adamax| optimizer.report().to_string();

    let mut optimizer = Adamax::from_named(vars.clone(), allow.clone()).unwrap();
    assert_eq!(line(&optimizer), "no call yet");
    optimizer.step(&GradStore::default()).unwrap();
    assert_eq!(line(&optimizer), "no gradient for 2 vars, lr 4e-4");
    give(&mut optimizer, &vars, &[0]).unwrap();
    assert_eq!(line(&optimizer), "updated 1 of 2 vars, lr 4e-4");
    // What comes after the call does not change its line.
    optimizer.add_var("c", scalar(1.0)).unwrap();
    assert_eq!(line(&optimizer), "updated 1 of 2 vars, lr 4e-4");
    assert!(format!("{:?}", optimizer.report()).contains("trained: 1"));

    // A norm that is asked for; digits.
    let clipped = ParamsAdamax { clip: Some(Clip::GlobalNorm(1.0)), lr: (1.0 / 3.0).into(), ..allow.clone() };
    let mut optimizer = Adamax::from_named(vars.clone(), clipped).unwrap();
    give(&mut optimizer, &vars, &[0, 1]).unwrap();
    assert_eq!(line(&optimizer), "updated 2 of 2 vars, lr 0.3333, norm 1.414");
    let measured = ParamsAdamax { measure_norm: true, lr: 123_456.0.into(), ..allow.clone() };
    let mut optimizer = Adamax::from_named(vars.clone(), measured).unwrap();
    optimizer.apply_gradients([(&vars[0].1, &tensor(&[f64::NAN], &[1], DType::F32))]).unwrap();
    assert_eq!(line(&optimizer), "updated 1 of 2 vars, lr 1.235e5, norm NaN");

    // Accumulated, updated with the sum, flushed.
    let accumulates = ParamsAdamax { gradient_accumulation_steps: 2, ..allow.clone() };
    let mut optimizer = Adamax::from_named(vars.clone(), accumulates).unwrap();
    give(&mut optimizer, &vars, &[0]).unwrap();
    assert_eq!(line(&optimizer), "accumulated 1 of 2 vars in call 1 of 2, lr 4e-4");
    assert_eq!(optimizer.report().trained(), 0);
    give(&mut optimizer, &vars, &[1]).unwrap();
    assert_eq!(line(&optimizer), "updated 2 of 2 vars, lr 4e-4");
    give(&mut optimizer, &vars, &[1]).unwrap();
    optimizer.flush_gradients().unwrap();
    assert_eq!(line(&optimizer), "updated 1 of 2 vars, lr 4e-4");

    // Skipped; the norm that was asked for is that of no update.
    let skips = ParamsAdamax { skip_nonfinite: true, measure_norm: true, ..allow };
    let mut optimizer = Adamax::from_named(vars.clone(), skips).unwrap();
    optimizer.apply_gradients([(&vars[0].1, &tensor(&[f64::NAN], &[1], DType::F32))]).unwrap();
    assert_eq!(line(&optimizer), "skipped: not finite, lr 4e-4");
}

#[test]
fn a_report_has_the_learning_rates_of_the_groups() {
    let vars = scalars(&["a", "b", "c", "d"]);
    let group = |name: &str, at: usize| ParamGroup::new(name).vars([vars[at].clone()]);
    let params = ParamsAdamax { lr: 4e-4.into(), missing_gradients: MissingGradients::Allow, ..Default::default() };
    let line = |groups: Vec<ParamGroup>| {
        let mut optimizer = Adamax::from_groups(groups, params.clone()).unwrap();
        give(&mut optimizer, &vars, &[0]).unwrap();
        optimizer.report().to_string()
    };
    assert_eq!(line(vec![group("x", 0), group("y", 1)]), "updated 1 of 2 vars, lr 4e-4");
    // The default group has no variables, and does not count.
    assert_eq!(
        line(vec![group("body", 0).lr_factor(0.1), group("head", 1)]),
        "updated 1 of 2 vars, lr body 4e-5, head 4e-4"
    );
    assert_eq!(line(vec![group("body", 0).lr(0.0)]), "updated 1 of 1 vars, lr 0");
    let many = (0..4).map(|at| group(&format!("layer {at}"), at).lr_factor(0.5f64.powi(at as i32)));
    assert_eq!(line(many.collect()), "updated 1 of 4 vars, lr 5e-5 to 4e-4");
}
