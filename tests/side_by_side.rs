//! Calls of the crate beside each other and beside candle's own operations: from plain threads, from tasks of rayon's
//! global pool, and from pools of the program's own. Nothing may wait for ever.
//!
//! A scenario repeats its calls for a moment, or for `ADAMAX_STRESS_SECONDS`. One that is not over long after that ends
//! the process, since a thread that waits for ever cannot be ended. The scenarios avoid what hangs without this crate:
//! see the documentation of `Adamax` on threads.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::process::abort;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use candle_adamax::{
    Adamax, Bags, Clip, Ema, EmbeddingBag, ParamsAdamax, Pooling, Rounding, SparseUpdate, StateDType, Table,
    WeightDecay,
};
use candle_core::{DType, Device, Tensor, Var};
use common::folder::Folder;
use common::{noise, pool};
use rayon::ThreadPool;

/// How much longer than it should a scenario may take, on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// Of square matrices: large enough to be shared among threads.
const SIDE: usize = 400;

/// A call that is repeated; it is told how often it was made before.
type Call<'c> = Box<dyn Fn(u64) + Sync + 'c>;

/// Where a call is repeated.
#[derive(Clone, Copy)]
enum Place<'p> {
    /// In a thread of its own.
    Thread,
    /// In tasks of a pool, or of the global one, as many at a time.
    Tasks(Option<&'p ThreadPool>, u64),
}

/// Makes all calls beside each other for a while, each at least once.
fn beside(scenario: &str, calls: Vec<(Place<'_>, Call<'_>)>) {
    // What hangs in one scenario would hang in others, too, and it would not be clear in which.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let seconds = std::env::var("ADAMAX_STRESS_SECONDS").map_or(1.5, |seconds| seconds.parse().unwrap());
    let duration = Duration::from_secs_f64(seconds);
    let (done, is_done) = channel::<()>();
    let (until, name) = (Instant::now() + duration, scenario.to_owned());
    let watchdog = thread::spawn(move || {
        if is_done.recv_timeout(duration + PATIENCE) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{name}: not over {PATIENCE:?} after its end");
            abort();
        }
    });
    thread::scope(|scope| {
        for (place, call) in &calls {
            scope.spawn(move || {
                let count = AtomicU64::new(0);
                let call = || call(count.fetch_add(1, Ordering::Relaxed));
                loop {
                    match *place {
                        Place::Thread => call(),
                        Place::Tasks(pool, n) => in_tasks(pool, n, |_| call()),
                    }
                    if Instant::now() >= until {
                        break;
                    }
                }
            });
        }
    });
    drop(done);
    watchdog.join().unwrap();
}

/// Makes `n` calls in tasks of a pool, or of the global one. This is a plain thread, whose tasks wait outside of the
/// workers' own queues, so that a worker takes one when it waits for another worker.
fn in_tasks(pool: Option<&ThreadPool>, n: u64, call: impl Fn(u64) + Sync) {
    let call = &call;
    match pool {
        Some(pool) => pool.in_place_scope(|tasks| (0..n).for_each(|i| tasks.spawn(move |_| call(i)))),
        None => rayon::in_place_scope(|tasks| (0..n).for_each(|i| tasks.spawn(move |_| call(i)))),
    }
}

fn random(shape: &[usize], dtype: DType) -> Tensor {
    let values: Vec<f32> = noise(7, shape.iter().product()).into_iter().map(|x| x as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn random_var(shape: &[usize], dtype: DType) -> Var {
    Var::from_tensor(&random(shape, dtype)).unwrap()
}

/// `n` ids of a table of `rows` rows, others for each `call`.
fn ids(call: u64, n: usize, rows: usize) -> Tensor {
    let ids = (0..n as u64).map(|i| ((i * 7919 + call * 104_729) % rows as u64) as u32).collect();
    Tensor::from_vec(ids, n, &Device::Cpu).unwrap()
}

/// An optimizer with the gradients that it is given again and again.
struct Trained {
    optimizer: RwLock<Adamax>,
    vars: Vec<Var>,
    grads: Vec<Tensor>,
}

impl Trained {
    fn new(vars: Vec<Var>, params: ParamsAdamax) -> Self {
        let named = vars.iter().enumerate().map(|(i, var)| (format!("v{i:03}"), var.clone()));
        let optimizer = RwLock::new(Adamax::from_named(named, params).unwrap());
        let grads = vars.iter().map(|var| random(var.dims(), var.dtype())).collect();
        Self { optimizer, vars, grads }
    }

    fn step(&self) {
        let mut optimizer = self.optimizer.write().unwrap();
        optimizer.apply_gradients(self.vars.iter().zip(&self.grads)).unwrap();
    }
}

/// A table and its optimizer.
struct Rows {
    weight: Var,
    table: Table,
    optimizer: RwLock<Adamax>,
    rows: usize,
}

impl Rows {
    fn new(rows: usize, params: ParamsAdamax) -> Self {
        let weight = random_var(&[rows, 16], DType::F32);
        let optimizer = Adamax::from_named([("table", weight.clone())], params).unwrap();
        Self { table: Table::new(&weight).unwrap(), weight, optimizer: RwLock::new(optimizer), rows }
    }

    /// With rows that lag behind: all have moments, and decay.
    fn lagging(rows: usize) -> Self {
        let weight_decay = WeightDecay::Decoupled(0.01);
        let params = ParamsAdamax { sparse_update: SparseUpdate::Exact, weight_decay, ..ParamsAdamax::default() };
        let table = Self::new(rows, params);
        table.step(0, rows);
        table.step(1, 10);
        table
    }

    fn lookup(&self, call: u64, n: usize) {
        let rows = self.table.lookup(&ids(call, n, self.rows)).unwrap();
        assert_eq!(rows.dims(), [n, 16]);
    }

    /// A step with the gradients of `n` rows.
    fn step(&self, call: u64, n: usize) {
        let loss = self.table.lookup(&ids(call, n, self.rows)).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        self.optimizer.write().unwrap().step(&grads).unwrap();
    }

    /// Sums of bags, with weights that have a gradient, too.
    fn bags(&self, call: u64) {
        let bags = Bags::batch(&ids(call, 4000, self.rows).reshape((400, 10)).unwrap()).unwrap();
        let weights = random_var(&[400, 10], DType::F32);
        let layer = EmbeddingBag::new(self.weight.as_tensor().clone(), Pooling::Sum).unwrap();
        let sums = layer.pool(&bags.weights(&weights).unwrap()).unwrap();
        let grads = sums.sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&weights).is_some());
        let layer = EmbeddingBag::new(self.weight.as_tensor().clone(), Pooling::Max).unwrap().max_norm(3.0).unwrap();
        let bags = Bags::batch(&ids(call, 400, self.rows).reshape((40, 10)).unwrap()).unwrap();
        layer.pool(&bags).unwrap();
    }
}

/// Variables and optimizers of all kinds.
struct World {
    x: Var,
    y: Var,
    /// Large variables and small ones, with a norm.
    dense: Trained,
    /// Accumulation and averages.
    averaged: Trained,
    /// Masters of bf16 parameters.
    halves: Trained,
    coded: Trained,
    table: Rows,
    lagging: Rows,
    folder: Folder,
}

impl World {
    fn new() -> Self {
        let small = |n: usize| (0..n).map(|_| random_var(&[6000], DType::F32));
        let (x, y) = (random_var(&[SIDE, SIDE], DType::F32), random_var(&[SIDE, SIDE], DType::F32));
        let dense = [x.clone(), y.clone()].into_iter().chain(small(60)).collect();
        let clipped = ParamsAdamax { clip: Some(Clip::GlobalNorm(1.0)), ..ParamsAdamax::default() };
        let averaged = [random_var(&[200_000], DType::F32)].into_iter().chain(small(60)).collect();
        let averages = ParamsAdamax {
            gradient_accumulation_steps: 2,
            ema: Some(Ema { momentum: 0.9, overwrite_frequency: Some(2) }),
            clip: Some(Clip::Norm(1.0)),
            ..ParamsAdamax::default()
        };
        let master = ParamsAdamax { rounding: Rounding::Master, ..ParamsAdamax::default() };
        let q8 = ParamsAdamax { state_dtype: StateDType::Q8, ..ParamsAdamax::default() };
        Self {
            x,
            y,
            dense: Trained::new(dense, clipped),
            averaged: Trained::new(averaged, averages),
            halves: Trained::new(vec![random_var(&[200_000], DType::BF16)], master),
            coded: Trained::new(vec![random_var(&[200_000], DType::F32)], q8),
            table: Rows::new(8000, ParamsAdamax::default()),
            lagging: Rows::lagging(8000),
            folder: Folder::new(),
        }
    }

    /// Everything but [`products`](Self::products).
    fn calls<'c>(&'c self, place: impl Fn(u64) -> Place<'c>) -> Vec<(Place<'c>, Call<'c>)> {
        let Self { x, y, dense, averaged, halves, coded, table, lagging, folder } = self;
        let mut calls: Vec<(Place<'c>, Call<'c>)> = Vec::new();
        let mut add = |n: u64, call: Call<'c>| calls.push((place(n), call));
        for trained in [dense, averaged, halves, coded] {
            add(1, Box::new(move |_| trained.step()));
        }
        for rows in [table, lagging] {
            add(2, Box::new(move |call| rows.step(call, 6000)));
            add(6, Box::new(move |call| rows.lookup(call, 5000)));
            add(2, Box::new(move |call| rows.bags(call)));
            add(
                1,
                Box::new(move |call| {
                    let values = random(&[100, 16], DType::F32);
                    rows.table.set_rows(&ids(call, 100, rows.rows), &values).unwrap();
                }),
            );
        }
        add(1, Box::new(move |_| lagging.optimizer.read().unwrap().catch_up().unwrap()));
        add(1, Box::new(move |_| assert_eq!(lagging.table.weight().unwrap().dims(), [8000, 16])));
        add(
            1,
            Box::new(move |_| {
                lagging.optimizer.read().unwrap().moment_statistics("table").unwrap();
                averaged.optimizer.read().unwrap().moment_statistics("v000").unwrap();
            }),
        );
        add(
            1,
            Box::new(move |_| {
                for optimizer in [&dense.optimizer, &lagging.optimizer, &coded.optimizer] {
                    optimizer.read().unwrap().snapshot().unwrap();
                }
            }),
        );
        add(
            1,
            Box::new(move |_| {
                lagging.optimizer.read().unwrap().save(folder.file("lagging")).unwrap();
                halves.optimizer.read().unwrap().save(folder.file("halves")).unwrap();
            }),
        );
        // candle's own operations; always y before x, or candle waits for itself.
        add(2, Box::new(move |_| assert_eq!((y.as_tensor() + x.as_tensor()).unwrap().dims(), [SIDE, SIDE])));
        add(
            1,
            Box::new(move |_| {
                let [y, x] = [y, x].map(|var| var.narrow(0, 0, 16).unwrap().narrow(1, 0, 16).unwrap());
                y.matmul(&x).unwrap();
            }),
        );
        let set = [x, y, &averaged.vars[0], &averaged.vars[9], &table.weight];
        let set = set.map(|var| (var, random(var.dims(), var.dtype())));
        add(
            1,
            Box::new(move |_| {
                for (var, value) in &set {
                    var.set(value).unwrap();
                }
            }),
        );
        calls
    }

    /// A product that gemm shares among the workers of the pool.
    fn products<'c>(&'c self) -> (Place<'c>, Call<'c>) {
        (Place::Thread, Box::new(|_| assert_eq!(self.y.matmul(&self.x).unwrap().dims(), [SIDE, SIDE])))
    }
}

/// Lookups of an `Exact` table, whose rows catch up, as tasks, and no step beside them.
#[test]
fn lookups_of_an_exact_table_in_tasks() {
    let rows = &Rows::lagging(200_000);
    for threads in [None, Some(4)] {
        let pool = threads.map(pool);
        let round: Call<'_> = Box::new(|round| {
            in_tasks(pool.as_ref(), 24, |task| rows.lookup(24 * round + task, 20_000));
            // All rows lag behind again.
            rows.step(round, 10);
        });
        beside(&format!("lookups of an exact table in tasks, threads: {threads:?}"), vec![(Place::Thread, round)]);
    }
}

/// A step of a table, with gradients of rows and of the whole table, beside lookups in tasks of the same pool.
#[test]
fn a_step_beside_lookups_in_tasks_of_its_pool() {
    for threads in [None, Some(1), Some(2)] {
        let pool = threads.map(pool);
        let rows = &Rows::new(200_000, ParamsAdamax::default());
        let whole = &Trained::new(vec![rows.weight.clone()], ParamsAdamax::default());
        let round: Call<'_> = Box::new(|round| {
            let work = || {
                rayon::scope(|scope| {
                    for task in 0..24 {
                        scope.spawn(move |_| rows.lookup(24 * round + task, 20_000));
                    }
                    if round % 2 == 0 { whole.step() } else { rows.step(round, 100_000) }
                });
            };
            match &pool {
                Some(pool) => pool.install(work),
                None => rayon::scope(|_| work()),
            }
        });
        let in_a_thread: Call<'_> = Box::new(|_| whole.step());
        let scenario = format!("a step beside lookups in tasks of its pool, threads: {threads:?}");
        beside(&scenario, vec![(Place::Thread, round), (Place::Thread, in_a_thread)]);
    }
}

/// A step of two variables beside operations that have both.
#[test]
fn a_step_beside_operations_of_its_variables() {
    let (x, y) = (&random_var(&[SIDE, SIDE], DType::F32), &random_var(&[SIDE, SIDE], DType::F32));
    for clip in [None, Some(Clip::GlobalNorm(1.0))] {
        let params = ParamsAdamax { clip, ..ParamsAdamax::default() };
        let trained = &Trained::new(vec![x.clone(), y.clone()], params);
        let sum: Call<'_> = Box::new(|_| assert_eq!((y.as_tensor() + x.as_tensor()).unwrap().dims(), [SIDE, SIDE]));
        let product: Call<'_> = Box::new(|_| assert_eq!(y.matmul(x).unwrap().dims(), [SIDE, SIDE]));
        let step: Call<'_> = Box::new(|_| trained.step());
        let scenario = format!("a step beside operations of its variables, clip: {clip:?}");
        beside(&scenario, [step, sum, product].map(|call| (Place::Thread, call)).into());
    }
}

/// Optimizers that share variables: large ones of one are small ones of another.
#[test]
fn steps_of_several_optimizers_of_the_same_variables() {
    let shared: Vec<Var> = (0..4).map(|_| random_var(&[200_000], DType::F32)).collect();
    let more = (0..8).map(|_| random_var(&[1_000_000], DType::F32));
    let all: Vec<Var> = shared.iter().cloned().chain(more).collect();
    let params = || ParamsAdamax { clip: Some(Clip::GlobalNorm(1.0)), ..ParamsAdamax::default() };
    let trained: Vec<Trained> =
        (0..4).map(|i| Trained::new(if i % 2 == 0 { all.clone() } else { shared.clone() }, params())).collect();
    let step = |trained| (Place::Thread, Box::new(move |_| Trained::step(trained)) as Call<'_>);
    beside("steps of several optimizers of the same variables", trained.iter().map(step).collect());
}

#[test]
fn everything_in_threads() {
    let world = World::new();
    let mut calls = world.calls(|_| Place::Thread);
    calls.push(world.products());
    beside("everything in threads", calls);
}

#[test]
fn everything_in_tasks_of_the_global_pool() {
    let world = World::new();
    beside("everything in tasks of the global pool", world.calls(|n| Place::Tasks(None, n)));
}

#[test]
fn everything_in_tasks_of_pools() {
    for threads in [1, 2] {
        let (world, pool) = (World::new(), pool(threads));
        let mut calls = world.calls(|n| Place::Tasks(Some(&pool), n));
        calls.push(world.products());
        beside(&format!("everything in tasks of an own pool of {threads}"), calls);
    }
}

/// The same variables from threads and from tasks of two pools; others from tasks of the global pool, where products of
/// the first are computed, too.
#[test]
fn everything_everywhere() {
    let (world, other, small, large) = (World::new(), World::new(), pool(1), pool(2));
    let mut calls = world.calls(|_| Place::Thread);
    calls.push(world.products());
    calls.extend(world.calls(|n| Place::Tasks(Some(&small), n)));
    calls.extend(world.calls(|n| Place::Tasks(Some(&large), n)));
    calls.extend(other.calls(|n| Place::Tasks(None, n)));
    beside("everything everywhere", calls);
}

/// Rows that are set beside steps of other rows and lookups of them: the crate's own writes are nobody else's.
#[test]
fn rows_that_are_set_beside_lookups_of_them() {
    let rows = &Rows::lagging(2_000);
    let table = Table::new(&rows.weight).unwrap();
    let few = Tensor::new(&[0u32, 1], &Device::Cpu).unwrap();
    let row_len = rows.weight.elem_count() / 2_000;
    let set: Call<'_> = Box::new(|call| {
        let values = Tensor::full(call as f32, (2, row_len), &Device::Cpu).unwrap();
        table.set_rows(&few, &values.to_dtype(rows.weight.dtype()).unwrap()).unwrap();
    });
    let look_up: Call<'_> = Box::new(|_| drop(table.lookup(&few).unwrap()));
    let step: Call<'_> = Box::new(|round| rows.step(round, 10));
    let calls = [set, look_up, step].map(|call| (Place::Thread, call));
    beside("rows that are set beside lookups of them", calls.into());
}
