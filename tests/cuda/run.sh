#!/usr/bin/env bash
# Runs tests/gpu.rs without a GPU, on a make-believe one (driver.cpp), in which the kernels run on the host.
#
#   tests/cuda/run.sh [FILTER..]
#
# Tests that need kernels of candle's own fail with "no kernel NAME"; those of the default filter need none. Needs a CUDA
# toolkit's NVRTC and headers, as building the feature does.
set -euo pipefail
cd "$(dirname "$0")/../.."

# What needs nothing but copies and this crate's kernels, without the thousand steps, which take ten minutes.
filter=("$@")
[ ${#filter[@]} -gt 0 ] || filter=(bits_of_the_cpu rows_that_a_caller_gives not_finite move_between streams in_one_optimizer
  bad_id --skip a_thousand)

program=$(cargo test --release --features cuda --test gpu --no-run 2>&1 |
  sed -n 's/.*Executable tests\/gpu.rs (\(.*\))$/\1/p')
[ -n "$program" ] || { echo "tests/gpu.rs was not built"; exit 1; }

driver=$(mktemp -d)
trap 'rm -rf "$driver"' EXIT
"${CXX:-c++}" -std=c++17 -O2 -ffp-contract=off -fno-strict-aliasing -Wall -Wextra -Wno-unknown-pragmas \
  -Wno-unused-function -fvisibility=hidden -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$driver/libcuda.so.1" tests/cuda/driver.cpp -ldl
for library in libcublas.so.13 libcublasLt.so.13 libcurand.so.10; do
  ln -s libcuda.so.1 "$driver/$library"
done
export LD_LIBRARY_PATH="$driver:${LD_LIBRARY_PATH:-}"
"$program" --test-threads 2 "${filter[@]}"
# Once more where the GPU is always behind what the host has asked for.
[ $# -gt 0 ] || ADAMAX_LATE=1 "$program" --test-threads 2 not_finite to_be_skipped of_the_step
