#!/usr/bin/env bash
# Puts a CUDA 13.0 toolkit (nvcc, ptxas, headers, NVRTC, cuBLAS, cuRAND) on a
# machine that has neither one nor a GPU, from the PyPI wheels of the vendor,
# so that candle's `cuda` feature builds and links and NVRTC compiles kernels.
#
#   source .ci/cuda-toolkit.sh    # installs on first use (about 1 GB), then sets the environment
#   cargo build --features cuda  # candle's own kernels take some minutes the first time
#
# CUDA_KIT       where it goes              (default: ~/.cache/cuda-kit)
# CUDA_COMPUTE_CAP  candle's build target   (default: 90; candle asks nvidia-smi otherwise)
#
# libcuda.so is the driver's and cannot be had without a GPU: a stub stands in
# for it at link time, and every call into it answers CUDA_ERROR_STUB_LIBRARY,
# so a program built here starts here too and says cleanly that there is no GPU.
# Where a real driver is installed, leave the stub off LD_LIBRARY_PATH.

_cuda_kit() {
  local kit=${CUDA_KIT:-$HOME/.cache/cuda-kit}
  local home
  if [ ! -e "$kit/ready" ]; then
    mkdir -p "$kit" || return 1
    python3 -m venv "$kit/venv" || return 1
    "$kit/venv/bin/pip" install --quiet --disable-pip-version-check \
      nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
      nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvrtc==13.0.88 \
      nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35 || return 1
    home=$(echo "$kit"/venv/lib/python3*/site-packages/nvidia/cu13)
    [ -x "$home/bin/nvcc" ] || { echo "cuda-toolkit.sh: no nvcc under $home" >&2; return 1; }
    ln -sfn "$home" "$kit/cuda"
    ln -sfn lib "$home/lib64"
    # Link names without the version, which the wheels leave out.
    local so
    for so in "$home"/lib/lib{cublas,cublasLt,cudart,curand,nvrtc}.so.*; do
      case $so in *alt*) continue ;; esac
      ln -sf "$(basename "$so")" "${so%%.so.*}.so"
    done
    # The driver's stub: every entry point that cuda.h declares answers 34.
    mkdir -p "$home/lib/stubs"
    grep -ohE '\bcu[A-Z][A-Za-z0-9_]+ *\(' "$home/include/cuda.h" "$home"/include/cuda*Typedefs.h 2>/dev/null |
      tr -d ' (' | sort -u | awk '{print "int " $1 "(void) { return 34; }"}' >"$kit/libcuda_stub.c"
    # The versioned names too (cuMemAlloc_v2, ..._ptsz), as the headers define them.
    grep -ohE '\bcu[A-Z][A-Za-z0-9]+_(v[0-9]+|ptsz|ptds|v[0-9]+_ptsz|v[0-9]+_ptds)\b' "$home/include/cuda.h" |
      sort -u | awk '{print "int " $1 "(void) { return 34; }"}' >>"$kit/libcuda_stub.c"
    sort -u -o "$kit/libcuda_stub.c" "$kit/libcuda_stub.c"
    cc -w -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$home/lib/stubs/libcuda.so" "$kit/libcuda_stub.c" || return 1
    ln -sf libcuda.so "$home/lib/stubs/libcuda.so.1"
    touch "$kit/ready"
  fi
  export CUDA_HOME=$kit/cuda
  export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}
  export PATH=$CUDA_HOME/bin:$PATH
  export LIBRARY_PATH=$CUDA_HOME/lib:$CUDA_HOME/lib/stubs${LIBRARY_PATH:+:$LIBRARY_PATH}
  export LD_LIBRARY_PATH=$CUDA_HOME/lib:$CUDA_HOME/lib/stubs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
}
_cuda_kit
