//! Functions of neural networks with a fast forward pass and a backward pass of their own, for [candle].
//!
//! candle-nn's fast functions have no backward pass. `LayerNorm`, `RmsNorm`, `softmax_last_dim`, the three forms of
//! `rope` and the flash attention on the CPU return tensors without a graph, and the parameters before them get no
//! gradients. No error says so. The functions of this crate compute the same results as fast, and are differentiable in
//! all their arguments.
//!
//! ```
//! use candle_core::{DType, Device, Result, Tensor, Var};
//! use candle_graft::{gelu, layer_norm, linear};
//!
//! # fn main() -> Result<()> {
//! let cpu = Device::Cpu;
//! let x = Tensor::randn(0f32, 1.0, (2, 5, 8), &cpu)?;
//! let weight = Var::randn(0f32, 0.1, (16, 8), &cpu)?;
//! let bias = Var::zeros(16, DType::F32, &cpu)?;
//! let scale = Var::ones(16, DType::F32, &cpu)?;
//!
//! let hidden = gelu(&linear(&x, &weight, Some(&bias))?)?;
//! let y = layer_norm(&hidden, &scale, None, 1e-5)?;
//! let grads = y.sqr()?.sum_all()?.backward()?;
//! for var in [&weight, &bias, &scale] {
//!     assert!(grads.get(var).is_some());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Types and precision
//!
//! Elements are f32, f64, f16 or bf16. Numbers of 16 bits are computed in f32, sums too, and each result and each
//! gradient is rounded once at the end. In f32 the exponential, the error function and the hyperbolic tangent are
//! polynomials and quotients of polynomials that vectorize; the exponential has a relative error of at most 1e-7, the
//! distribution function of [`gelu`] one of at most 5e-7, also where it is tiny.
//!
//! # Devices
//!
//! On the CPU the functions have kernels of their own, forward and backward, which choose the machine's vector
//! instructions at run time. On other devices each function is a composition of candle's differentiable operations.
//!
//! # Threads
//!
//! Large tensors are computed by the threads of rayon's current pool. The bits do not depend on their number: sums over
//! rows have parts of a fixed size, which are added in their order.
//!
//! # Graphs
//!
//! A result has a graph only where an argument is tracked, and an argument that is not tracked costs nothing in the
//! backward pass. Gradients have no graph: second derivatives are not supported, as candle detaches gradients, too.
//!
//! Arguments need not be contiguous. Those that are not are copied, once forward and once backward, without an
//! operation of its own in the graph.
//!
//! # Errors
//!
//! Arguments whose shapes, types or devices do not fit are errors, which name the function, the argument, its shape and
//! what is allowed.
//!
//! [candle]: https://github.com/huggingface/candle

mod activation;
mod attention;
mod check;
mod composed;
mod cpu;
mod dropout;
mod kernel;
mod linear;
mod loss;
mod norm;
mod probabilities;
mod rope;
mod softmax;

#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;

pub use activation::{gelu, gelu_tanh, sigmoid, silu};
pub use attention::{Mask, alibi_slopes, attention};
pub use dropout::dropout;
pub use linear::linear;
pub use loss::cross_entropy;
pub use norm::{layer_norm, rms_norm};
pub use rope::{rope, rope_i, rope_thd};
pub use softmax::{log_softmax, softmax, softmax_last_dim};
