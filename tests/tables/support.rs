//! What the tests of tables share: ids, gradients of rows, what a table is given, and calls that are checked against the
//! formulas.

use std::collections::{BTreeMap, BTreeSet};

use candle_adamax::{Adamax, EpsMode, Gradient, Kernel, MissingGradients, ParamGroup, ParamsAdamax, SparseGrad};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use crate::common::gradients::{Grad, Whole, row_len};
use crate::common::{Fingerprint, bits, formulas, ids, noise, tensor, values};

/// Ids of one of these dtypes. Not by a conversion of candle's, which not all of them have.
#[track_caller]
pub(crate) fn ids_of(of: &[i64], shape: &[usize], dtype: DType) -> Tensor {
    let device = &Device::Cpu;
    match dtype {
        DType::U8 => Tensor::from_vec(of.iter().map(|&id| id as u8).collect(), shape, device),
        DType::U32 => Tensor::from_vec(of.iter().map(|&id| id as u32).collect(), shape, device),
        DType::I16 => Tensor::from_vec(of.iter().map(|&id| id as i16).collect(), shape, device),
        DType::I32 => Tensor::from_vec(of.iter().map(|&id| id as i32).collect(), shape, device),
        DType::I64 => Tensor::from_vec(of.to_vec(), shape, device),
        other => panic!("{other:?} is no dtype of ids"),
    }
    .unwrap()
}

/// The gradient `values` of the rows `of`, each of the shape `row`.
#[track_caller]
pub(crate) fn sparse(of: &[u32], values: &[f64], row: &[usize], dtype: DType) -> SparseGrad {
    let shape: Vec<usize> = [of.len()].into_iter().chain(row.iter().copied()).collect();
    SparseGrad { indices: ids(of), values: tensor(values, &shape, dtype) }
}

/// A gradient of noise for the rows `of`.
#[track_caller]
pub(crate) fn noisy(of: &[u32], seed: u64, row: &[usize], dtype: DType) -> SparseGrad {
    sparse(of, &noise(seed, of.len() * row.iter().product::<usize>()), row, dtype)
}

/// Multiples of 1/256 between -1 and 1: any dtype holds them, and their sums are exact in f32, in any order.
pub(crate) fn coarse(seed: u64, n: usize) -> Vec<f64> {
    noise(seed, n).into_iter().map(|x| (x * 255.0).round() / 256.0).collect()
}

/// The sum of the values of each row, in f64: the gradient of a table of `rows` rows, and the rows that it is for.
#[track_caller]
pub(crate) fn scatter(of: &[u32], values: &[f64], rows: usize, row_len: usize) -> Received {
    let mut g = vec![0.0; rows * row_len];
    for (position, &row) in of.iter().enumerate() {
        for i in 0..row_len {
            g[row as usize * row_len + i] += values[position * row_len + i];
        }
    }
    Received { g, rows: of.iter().map(|&row| row as usize).collect() }
}

/// What a step gave to a table.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Received {
    /// The gradient in the shape of the table; zeros in the other rows.
    pub(crate) g: Vec<f64>,
    /// The rows that were updated, be it with zeros.
    pub(crate) rows: BTreeSet<usize>,
}

/// What a step of `grads` gives to `var`, which stays as it is; `None` if that is not even a gradient of no row.
#[track_caller]
pub(crate) fn received(var: &Var, grads: &GradStore) -> Option<Received> {
    // m is the gradient then, and u its magnitude plus 1, which marks rows that were updated with zeros.
    let params = ParamsAdamax {
        lr: 0.0.into(),
        beta1: 0.0,
        eps: 1.0,
        eps_mode: EpsMode::InsideMax,
        missing_gradients: MissingGradients::Allow,
        ..Default::default()
    };
    let mut optimizer = Adamax::from_named([("var", var.clone())], params).unwrap();
    let before = bits(var);
    optimizer.step(grads).unwrap();
    assert_eq!(bits(var), before, "a learning rate of 0 changes nothing");
    if optimizer.report().missing().count() == 1 {
        return None;
    }
    let state = optimizer.state("var").unwrap();
    let (g, u, len) = (values(&state.exp_avg), values(&state.exp_inf), row_len(var.dims()));
    let rows = (0..var.dim(0).unwrap()).filter(|row| u[row * len..][..len].iter().any(|&u| u != 0.0)).collect();
    Some(Received { g, rows })
}

/// Whether each number is within `bound` of the expected one.
#[track_caller]
pub(crate) fn assert_near(got: &[f64], expected: &[f64], bound: f64, context: &str) {
    assert_eq!(got.len(), expected.len(), "{context}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= bound, "{context}: element {i}: expected {expected:e}, got {got:e}");
    }
}

/// An optimizer and its variables; every step is checked against the formulas.
pub(crate) struct Checked {
    pub(crate) optimizer: Adamax,
    pub(crate) weights: BTreeMap<String, Var>,
    norm_error: f64,
}

impl Checked {
    /// Variables of noise, all in the group "default".
    #[track_caller]
    pub(crate) fn new(vars: &[(&str, &[usize], DType)], params: ParamsAdamax, kernel: Kernel) -> Self {
        let weight = |(seed, (name, shape, dtype)): (u64, &(&str, &[usize], DType))| {
            let n = shape.iter().product();
            ((*name).to_owned(), Var::from_tensor(&tensor(&noise(77 + seed, n), shape, *dtype)).unwrap())
        };
        Self::of((0..).zip(vars).map(weight).collect(), params, kernel, &[])
    }

    /// An optimizer of `weights`; those that a group names are in it, all others in "default".
    #[track_caller]
    pub(crate) fn of(
        weights: BTreeMap<String, Var>,
        params: ParamsAdamax,
        kernel: Kernel,
        groups: &[(&str, ParamGroup)],
    ) -> Self {
        let mut default = ParamGroup::new("default");
        let mut others = Vec::new();
        for (name, var) in &weights {
            match groups.iter().find(|(of, _)| of == name) {
                Some((_, group)) => others.push(group.clone().var(name.as_str(), var)),
                None => default = default.var(name.as_str(), var),
            }
        }
        let mut optimizer = Adamax::from_groups([default].into_iter().chain(others), params).unwrap();
        optimizer.set_kernel(kernel).unwrap();
        // candle sums the f32 magnitudes of the portable path's norms in f32.
        let norm_error = if kernel == Kernel::Portable { 1e-4 } else { 0.0 };
        Self { optimizer, weights, norm_error }
    }

    /// A step of these gradients. Rows that none of them names keep all their bits.
    #[track_caller]
    pub(crate) fn step(&mut self, grads: &BTreeMap<String, Grad>, context: &str) {
        let before = self.optimizer.snapshot().unwrap();
        let expected = formulas::call(&before, &self.weights, grads, self.norm_error);
        let bits_before: BTreeMap<&String, [Vec<u64>; 3]> =
            self.weights.keys().map(|name| (name, self.bits(name))).collect();
        self.optimizer
            .apply_gradients(grads.iter().map(|(name, grad)| (&self.weights[name], Gradient::from(grad))))
            .unwrap_or_else(|error| panic!("{context}: {error}"));
        let after = self.optimizer.snapshot().unwrap();
        if let Some(mismatch) = expected.mismatch(&after, &self.weights) {
            panic!("{context}: {mismatch}");
        }
        assert_eq!(self.optimizer.report().updated(), expected.updated, "{context}");
        match (self.optimizer.report().total_norm(), expected.total_norm) {
            (Some(got), Some(expected)) => assert!(expected.allows(got), "{context}: norm {expected:?}, got {got:e}"),
            (None, Some(_)) => panic!("{context}: no norm is reported"),
            (_, None) => {}
        }
        for (name, before_call) in bits_before {
            let shape = self.weights[name].dims();
            let mut touched = grads.get(name).map(|grad| Whole::of(grad, shape));
            if let Some((sum, _)) = &before.vars[name].accumulated {
                let sum = Whole::accumulated(sum, shape);
                touched = Some(touched.map_or(sum.clone(), |touched| touched.plus(&sum)));
            }
            let untouched = |i: &usize| touched.as_ref().is_none_or(|touched| !touched.touches(*i, shape));
            for (what, (before, after)) in ["w", "m", "u"].iter().zip(before_call.iter().zip(self.bits(name))) {
                if let Some(i) = (0..after.len()).filter(untouched).find(|&i| before[i] != after[i]) {
                    panic!("{context}: {name}.{what}[{i}] is of an untouched row and has changed");
                }
            }
        }
    }

    fn bits(&self, name: &str) -> [Vec<u64>; 3] {
        let state = self.optimizer.state(name).unwrap();
        [bits(&self.weights[name]), bits(&state.exp_avg), bits(&state.exp_inf)]
    }

    pub(crate) fn fingerprint(&self) -> Fingerprint {
        let vars: Vec<_> = self.weights.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
        Fingerprint::of(&self.optimizer, &vars)
    }
}

/// Gradients by the names of their variables.
pub(crate) fn grads<const N: usize>(of: [(&str, Grad); N]) -> BTreeMap<String, Grad> {
    of.into_iter().map(|(name, grad)| (name.to_owned(), grad)).collect()
}
