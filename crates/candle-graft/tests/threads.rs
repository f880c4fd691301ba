//! Results and gradients have the same bits whatever the number of threads.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_graft::{
    Mask, attention, cross_entropy, gelu, gelu_tanh, layer_norm, linear, log_softmax, rms_norm, rope, rope_i, silu,
    softmax_last_dim,
};
use common::{derive, numbers};
use rayon::ThreadPoolBuilder;

/// Compares the bits with one thread and with three. The shapes are of tensors that are worth more than one.
fn check(
    name: &str,
    shapes: &[&[usize]],
    function: impl Fn(&[Tensor]) -> candle_core::Result<Tensor> + Sync,
) -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        let args = shapes.iter().enumerate().map(|(i, shape)| Ok(numbers(shape, i as u64)?.to_dtype(dtype)?));
        let args = args.collect::<Result<Vec<_>>>()?;
        let weights = numbers(function(&args)?.dims(), 99)?.to_dtype(dtype)?;
        let run = |threads: usize| -> Result<Vec<Vec<u32>>> {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build()?;
            let (y, grads) = pool.install(|| derive(&args, Some(&weights), &function))?;
            let bits = |x: &Tensor| -> Result<Vec<u32>> {
                let numbers = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                Ok(numbers.into_iter().map(f32::to_bits).collect())
            };
            [y].iter().chain(&grads).map(bits).collect()
        };
        let (one, three) = (run(1)?, run(3)?);
        for (i, (one, three)) in one.iter().zip(&three).enumerate() {
            assert!(one == three, "{name} in {dtype:?}, {i}");
        }
    }
    Ok(())
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let n = &[65][..];
    check("layer_norm", &[&[3001, 65], n, n], |a| layer_norm(&a[0], &a[1], Some(&a[2]), 1e-5))?;
    check("rms_norm", &[&[3001, 65], n], |a| rms_norm(&a[0], &a[1], 1e-5))?;
    check("softmax", &[&[3001, 65]], |a| softmax_last_dim(&a[0]))?;
    check("log_softmax", &[&[3001, 65]], |a| log_softmax(&a[0], 1))?;
    check("gelu", &[&[3001, 65]], |a| gelu(&a[0]))?;
    check("gelu_tanh", &[&[3001, 65]], |a| gelu_tanh(&a[0]))?;
    check("silu", &[&[3001, 65]], |a| silu(&a[0]))?;
    check("linear", &[&[3001, 65], &[70, 65], &[70]], |a| linear(&a[0], &a[1], Some(&a[2])))?;
    let [cos, sin] = [1, 2].map(|seed| numbers(&[91, 8], seed));
    let (cos, sin) = (cos?, sin?);
    let cs = |x: &Tensor| -> candle_core::Result<_> { Ok((cos.to_dtype(x.dtype())?, sin.to_dtype(x.dtype())?)) };
    check("rope", &[&[11, 7, 91, 16]], |a| cs(&a[0]).and_then(|(cos, sin)| rope(&a[0], &cos, &sin)))?;
    check("rope_i", &[&[11, 7, 91, 16]], |a| cs(&a[0]).and_then(|(cos, sin)| rope_i(&a[0], &cos, &sin)))?;
    let targets = Tensor::from_iter((0..3001u32).map(|i| i % 65), &Device::Cpu)?;
    check("cross_entropy", &[&[3001, 65]], |a| cross_entropy(&a[0], &targets))?;
    let qkv: [&[usize]; 3] = [&[5, 4, 70, 16], &[5, 2, 90, 16], &[5, 2, 90, 16]];
    check("attention", &qkv, |a| attention(&a[0], &a[1], &a[2], 0.3, &Mask::Causal { kv_offset: 20 }, Some(5.0), None))
}
