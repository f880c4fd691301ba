//! Every call that is refused, in every state of an optimizer: nothing has changed, and the run goes on as if the call had
//! never been made.

use candle_adamax::{
    Adamax, Ema, GradScaler, LossScale, ParamGroup, ParamsAdamax, Result, Rounding, SparseGrad, SparseUpdate,
    StateDType, TouchedRows, WeightDecay,
};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use crate::common::folder::Folder;
use crate::common::{Fingerprint, ids, noise, tensor, var};

const ROWS: usize = 12;
const DIM: usize = 3;

/// An optimizer in some state, with its variables `bias` and `table`.
struct Run {
    optimizer: Adamax,
    vars: Vec<(String, Var)>,
    /// Whether the table has gradients of rows.
    by_rows: bool,
    calls: u64,
}

impl Run {
    fn new(params: &ParamsAdamax, dtype: DType, by_rows: bool, calls: u64) -> Self {
        let make = |seed, shape: &[usize]| var(&noise(seed, shape.iter().product()), shape, dtype);
        let vars = vec![("bias".to_owned(), make(1, &[5])), ("table".to_owned(), make(2, &[ROWS, DIM]))];
        let optimizer = Adamax::from_named(vars.clone(), params.clone()).unwrap();
        let mut run = Self { optimizer, vars, by_rows, calls: 0 };
        (0..calls).for_each(|_| run.call());
        run
    }

    /// One good call; each has other gradients and other rows.
    fn call(&mut self) {
        self.calls += 1;
        let (bias, table) = (&self.vars[0].1, &self.vars[1].1);
        let of =
            |var: &Var, shape: &[usize]| tensor(&noise(100 + self.calls, shape.iter().product()), shape, var.dtype());
        let of_bias = of(bias, &[5]);
        if self.by_rows {
            let rows = [self.calls as u32 % 7, 3, self.calls as u32 % 7 + 5];
            let of_rows = SparseGrad { indices: ids(&rows), values: of(table, &[3, DIM]) };
            let pairs = [(bias, (&of_bias).into()), (table, (&of_rows).into())];
            self.optimizer.apply_gradients::<candle_adamax::Gradient<'_>>(pairs).unwrap();
        } else {
            let of_table = of(table, &[ROWS, DIM]);
            self.optimizer.apply_gradients([(bias, &of_bias), (table, &of_table)]).unwrap();
        }
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.optimizer, &self.vars)
    }
}

/// The states: settings, dtype of the variables, whether gradients are of rows, calls so far.
fn states() -> Vec<(&'static str, ParamsAdamax, DType, bool, u64)> {
    let base = || ParamsAdamax { lr: 0.1.into(), weight_decay: WeightDecay::Decoupled(0.1), ..Default::default() };
    let thirds = || ParamsAdamax { gradient_accumulation_steps: 3, ..base() };
    let exact = || ParamsAdamax { sparse_update: SparseUpdate::Exact, ..base() };
    let masters = ParamsAdamax { rounding: Rounding::Master, ..base() };
    let averages = ParamsAdamax { ema: Some(Ema { momentum: 0.9, overwrite_frequency: Some(2) }), ..base() };
    let scaler = GradScaler { init_scale: 4.0, growth_interval: 2, ..GradScaler::default() };
    let scaled = ParamsAdamax { loss_scale: LossScale::Dynamic(scaler), ..base() };
    vec![
        ("fresh", base(), DType::F32, true, 0),
        ("after some steps", base(), DType::F64, true, 4),
        ("half accumulated, dense", thirds(), DType::F32, false, 5),
        ("half accumulated, rows", thirds(), DType::BF16, true, 2),
        ("rows that have missed updates", exact(), DType::F32, true, 6),
        (
            "the same, half accumulated",
            ParamsAdamax { sparse_update: SparseUpdate::Exact, ..thirds() },
            DType::F32,
            true,
            7,
        ),
        ("Q8 by rows", ParamsAdamax { state_dtype: StateDType::Q8, ..base() }, DType::F32, true, 3),
        (
            "Q8 of rows that have missed updates",
            ParamsAdamax { state_dtype: StateDType::Q8, ..exact() },
            DType::F32,
            true,
            5,
        ),
        ("masters", masters, DType::BF16, true, 3),
        ("averages", averages, DType::F32, false, 3),
        ("loss scale", scaled, DType::F32, true, 3),
    ]
}

/// A call that is refused, with its name.
type Refused = (&'static str, fn(&mut Run) -> Result<()>);

/// The calls that are refused in every state.
fn refused() -> Vec<Refused> {
    fn table(run: &Run) -> Var {
        run.vars[1].1.clone()
    }
    fn apply<'a>(run: &mut Run, var: &'a Var, grad: impl Into<candle_adamax::Gradient<'a>>) -> Result<()> {
        run.optimizer.apply_gradients([(var, grad)]).map(drop)
    }
    fn rows(rows: &[u32], shape: &[usize], dtype: DType) -> SparseGrad {
        SparseGrad { indices: ids(rows), values: Tensor::ones(shape, dtype, &Device::Cpu).unwrap() }
    }
    fn ones(shape: &[usize], dtype: DType) -> Tensor {
        Tensor::ones(shape, dtype, &Device::Cpu).unwrap()
    }
    vec![
        ("no gradient", |run| run.optimizer.step(&GradStore::default()).map(drop)),
        ("a gradient of another shape", |run| {
            let (table, dtype) = (table(run), table(run).dtype());
            apply(run, &table, &ones(&[DIM, ROWS], dtype))
        }),
        ("a gradient of another dtype", |run| {
            let table = table(run);
            apply(run, &table, &ones(&[ROWS, DIM], DType::I64))
        }),
        ("a gradient in the memory of a variable", |run| {
            let table = table(run);
            apply(run, &table.clone(), &table.as_tensor().detach())
        }),
        ("a row that is none", |run| {
            let table = table(run);
            apply(run, &table, &rows(&[0, 12], &[2, DIM], table.dtype()))
        }),
        ("rows of another shape", |run| {
            let table = table(run);
            apply(run, &table, &rows(&[0, 1], &[2, DIM + 1], table.dtype()))
        }),
        ("a stranger", |run| apply(run, &var(&[1.0], &[1], DType::F32), &ones(&[1], DType::F32))),
        ("two gradients", |run| {
            let (table, grad) = (table(run), rows(&[1], &[1, DIM], table(run).dtype()));
            run.optimizer.apply_gradients([(&table, &grad), (&table, &grad)]).map(drop)
        }),
        ("touched rows that are none", |run| {
            let (table, ids) = (table(run), ids(&[99]));
            let grads = table.sqr()?.sum_all()?.backward()?;
            run.optimizer.step_rows(&grads, [(&table, TouchedRows::Ids(&ids))]).map(drop)
        }),
        ("a learning rate below 0", |run| {
            use candle_nn::Optimizer;
            run.optimizer.set_learning_rate(-1.0);
            let grads = table(run).sqr()?.sum_all()?.backward()?;
            let refused = run.optimizer.step(&grads).map(drop);
            run.optimizer.set_learning_rate(0.1);
            refused
        }),
        ("settings", |run| run.optimizer.set_params(ParamsAdamax { beta1: 1.0, ..run.optimizer.params().clone() })),
        ("settings that Q8 does not allow", |run| {
            let params = run.optimizer.params().clone();
            run.optimizer.set_params(ParamsAdamax { beta1: 0.9999, state_dtype: StateDType::Q8, ..params })
        }),
        ("an unknown group", |run| run.optimizer.set_group(candle_adamax::GroupSettings::new("none"))),
        ("a group that is there", |run| run.optimizer.add_group(ParamGroup::new("default"))),
        ("a group of a variable that is there", |run| {
            run.optimizer.add_group(ParamGroup::new("new").var("other", &table(run)))
        }),
        ("a name that is there", |run| run.optimizer.add_var("table", var(&[1.0], &[1], DType::F32))),
        ("a variable that is not there", |run| run.optimizer.remove_var("none").map(drop)),
        ("rows to reset that are none", |run| run.optimizer.reset_rows("table", &ids(&[12]))),
        ("rows to append of another shape", |run| {
            run.optimizer.append_rows("table", &ones(&[1, DIM + 1], table(run).dtype())).map(drop)
        }),
        ("the state of other variables", |run| {
            let other = Adamax::from_named([("other", var(&[1.0], &[1], DType::F32))], ParamsAdamax::default())?;
            run.optimizer.restore(&other.snapshot()?)
        }),
        ("a file that is not there", |run| run.optimizer.load(Folder::new().file("none"))),
        ("a folder that is not there", |run| run.optimizer.save(Folder::new().file("none").join("state"))),
        ("a metric without a plateau", |run| run.optimizer.observe_metric(1.0).map(drop)),
        ("a schedule", |run| run.optimizer.start_schedule(candle_adamax::CosineDecay::new(-1.0, 10))),
        ("PyTorch's file", |run| run.optimizer.save_torch(Folder::new().file("state"))),
    ]
}

#[test]
fn a_refused_call_changes_nothing() {
    for (state, params, dtype, by_rows, calls) in states() {
        let make = || Run::new(&params, dtype, by_rows, calls);
        let (mut run, mut twin) = (make(), make());
        assert_eq!(run.fingerprint(), twin.fingerprint(), "{state}");
        for (call, refuse) in refused() {
            assert!(refuse(&mut run).is_err(), "{state}: {call} is accepted");
            assert!(run.fingerprint() == twin.fingerprint(), "{state}: {call} changes something");
        }
        let snapshot = run.optimizer.snapshot().unwrap();
        run.optimizer.restore(&snapshot).unwrap();
        for _ in 0..4 {
            run.call();
            twin.call();
            assert!(run.fingerprint() == twin.fingerprint(), "{state}: the run goes on in another way");
        }
    }
}
