//! The kernels' text, compiled by NVRTC for the GPU at hand, once in a process.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::CudaDevice;
use cudarc::driver::CudaFunction;
use cudarc::nvrtc::result as nvrtc;

use super::source::Module;
use crate::error::Result;
use crate::trace;

/// The oldest compute capability that NVRTC 13 compiles for.
const OLDEST: u32 = 75;

/// The PTX that the compiler made, or what it said.
type Compiled = std::result::Result<Arc<str>, String>;

/// The PTX of a module for a compute capability such as 90.
fn compile(module: Module, capability: u32) -> Compiled {
    compile_with_log(module, capability).map(|(ptx, _)| ptx.into())
}

/// The same with the compiler's warnings.
#[expect(unsafe_code, reason = "the compiler's own functions, of which cudarc's safe ones pass over the warnings")]
fn compile_with_log(module: Module, capability: u32) -> std::result::Result<(String, String), String> {
    let options = [
        format!("--gpu-architecture=compute_{capability}"),
        "--std=c++17".to_owned(),
        // As on the CPU: each operation rounds once, subnormal numbers are numbers, and division is IEEE's.
        "--fmad=false".to_owned(),
        "--ftz=false".to_owned(),
        "--prec-div=true".to_owned(),
        "--prec-sqrt=true".to_owned(),
    ];
    let (source, name) = (CString::new(module.source()), CString::new(format!("{}.cu", module.name())));
    let (Ok(source), Ok(name)) = (source, name) else { return Err("a source with a zero in it".to_owned()) };
    let said = |error: nvrtc::NvrtcError| error.to_string();
    let program = nvrtc::create_program(&source, Some(&name)).map_err(said)?;
    // SAFETY: the program was created above and is destroyed below.
    let compiled = unsafe { nvrtc::compile_program(program, &options) };
    // SAFETY: as above; the text is a copy.
    let log = unsafe { nvrtc::get_program_log(program) };
    // SAFETY: as above; the text is a copy, or an error where nothing was compiled.
    let ptx = unsafe { nvrtc::get_ptx(program) };
    // SAFETY: nobody else has the program. What destroying it could say would be of no use here.
    let _ = unsafe { nvrtc::destroy_program(program) };
    let text = |bytes: Vec<std::ffi::c_char>| {
        let bytes: Vec<u8> = bytes.into_iter().map(|byte| byte as u8).take_while(|&byte| byte != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let log = log.map(text).unwrap_or_default();
    match compiled {
        Ok(()) => Ok((text(ptx.map_err(said)?), log)),
        Err(error) => Err(format!("{error}: {log}")),
    }
}

/// The same, remembered.
fn compiled(module: Module, capability: u32) -> Compiled {
    static COMPILED: LazyLock<Mutex<HashMap<(Module, u32), Compiled>>> = LazyLock::new(Mutex::default);
    let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    compiled.entry((module, capability)).or_insert_with(|| compile(module, capability)).clone()
}

/// The compute capability of a device, as in `sm_90`.
fn capability(device: &CudaDevice) -> Result<u32> {
    let (major, minor) = device.cuda_stream().context().compute_capability().map_err(candle_core::Error::wrap)?;
    Ok(10 * major as u32 + minor as u32)
}

/// A kernel, loaded on a device.
///
/// # Errors
///
/// The compiler's log; the driver's errors.
pub(crate) fn load(device: &CudaDevice, module: Module, kernel: &str) -> Result<CudaFunction> {
    let ptx = compiled(module, capability(device)?).map_err(candle_core::Error::msg)?;
    Ok(device.get_or_load_custom_func(kernel, &module.name(), &ptx)?.into_cuda_function())
}

/// Whether the kernels run on this device. Where they do not, it says so, once for each cause.
pub(crate) fn has_kernels(device: &CudaDevice) -> bool {
    static ANSWERS: LazyLock<Mutex<HashMap<usize, bool>>> = LazyLock::new(Mutex::default);
    let context = device.cuda_stream().context().clone();
    let mut answers = ANSWERS.lock().unwrap_or_else(PoisonError::into_inner);
    *answers.entry(context.ordinal()).or_insert_with(|| {
        let answer = capability(device).map_err(|error| error.to_string()).and_then(|capability| {
            if capability < OLDEST {
                return Err(format!("its compute capability is {capability}, and the oldest one is {OLDEST}"));
            }
            // One module stands for all: the others are compiled when they are needed.
            load(device, Module::Passes, "accumulate_f32").map_err(|error| error.to_string())
        });
        if let Err(cause) = &answer {
            let gpu = context.name().unwrap_or_else(|_| "the GPU".to_owned());
            trace::no_kernels(&gpu, cause);
        }
        answer.is_ok()
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    /// Turing to Blackwell.
    const CAPABILITIES: [u32; 7] = [75, 80, 86, 89, 90, 100, 120];

    #[test]
    fn every_kernel_compiles_for_every_gpu_without_a_warning() {
        for module in Module::ALL {
            for capability in CAPABILITIES {
                match compile_with_log(module, capability) {
                    Ok((ptx, log)) => {
                        assert!(log.trim().is_empty() && !ptx.is_empty(), "{module:?}: {log}");
                        assert_eq!(fusible(&ptx), None, "{module:?}");
                    }
                    Err(log) => panic!("{module:?} for {capability}: {log}"),
                }
            }
        }
    }

    /// An operation that rounds otherwise than the CPU's, or that the driver's compiler may make such a one of: only with `.rn`
    /// it rounds once, and is left alone.
    fn fusible(ptx: &str) -> Option<&str> {
        let is_one = |word: &&str| {
            let of_floats = word.ends_with(".f32") || word.ends_with(".f64");
            let rounds = ["add.", "sub.", "mul.", "div.", "sqrt."].iter().any(|operation| word.starts_with(operation));
            word.starts_with("fma.")
                || (word.starts_with("mad.") && of_floats)
                || (rounds && of_floats && !word.contains(".rn."))
        };
        ptx.split_whitespace().find(is_one)
    }

    #[test]
    fn what_can_be_fused_is_found() {
        assert_eq!(fusible("add.rn.f32 %f1, %f2, %f3; mul.lo.s32 %r1, %r2, %r3; mad.lo.s32 %r1;"), None);
        for found in ["fma.rn.f32", "mul.f32", "add.ftz.f32", "div.approx.f32", "sqrt.f64"] {
            assert_eq!(fusible(&format!("ld.f32 x; {found} y")), Some(found));
        }
    }

    #[test]
    fn what_does_not_compile_is_an_error_with_the_compilers_log() {
        let log = compile(Module::Passes, 12).expect_err("no such GPU");
        assert!(log.contains("gpu-architecture"), "{log}");
    }

    #[test]
    fn kernels_of_the_update_keep_their_values_in_registers() {
        for module in Module::ALL.into_iter().filter(|module| matches!(module, Module::Update(_))) {
            for capability in [80, 90] {
                let ptx = compile(module, capability).expect("compiles");
                let report = ptxas(&ptx, capability);
                let spills: Vec<&str> = report.lines().filter(|line| line.contains("spill")).collect();
                assert!(!spills.is_empty(), "{report}");
                let clean = |line: &&&str| line.contains(" 0 bytes spill stores, 0 bytes spill loads");
                assert_eq!(spills.iter().filter(clean).count(), spills.len(), "{module:?}: {report}");
            }
        }
    }

    /// What the assembler of the toolkit, which candle's own build needs, says of registers and memory.
    fn ptxas(ptx: &str, capability: u32) -> String {
        let mut child = Command::new("ptxas")
            .args(["-v", &format!("-arch=sm_{capability}"), "-o", "/dev/null", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("ptxas of a CUDA toolkit in PATH");
        child.stdin.take().expect("piped").write_all(ptx.as_bytes()).expect("ptxas reads");
        let output = child.wait_with_output().expect("ptxas ends");
        let report = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{report}");
        report
    }
}
