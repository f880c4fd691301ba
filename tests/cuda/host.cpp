// All kernels, and what the tests ask of the headers, compiled for the host.
#include "host.h"

#include "../../cuda/adamax.cu"
#include "../../cuda/exact.cu"
#include "../../cuda/passes.cu"
#include "../../cuda/pool.cu"
#include "../../cuda/rows.cu"
#include "../../cuda/sort.cu"
#include "../../cuda/summary.cu"

// Sizes of the structures that both sides have, in the order of src/kernel/cuda/abi.rs.
extern "C" __attribute__((visibility("default"))) void host_sizes(uint64_t* sizes) {
    const uint64_t all[] = {sizeof(Tensor),   sizeof(Coefficients<double>), sizeof(Coefficients<float>), sizeof(UpdateArgs),
                            sizeof(Chunk),    sizeof(Control),              sizeof(UpdateLaunchArgs),
                            sizeof(Gradient), sizeof(LeavesArgs),           sizeof(NormsArgs),           sizeof(JoinArgs),
                            sizeof(Pair),     sizeof(PairArgs),             sizeof(GatherArgs),          sizeof(IdsArgs),
                            sizeof(LookupGrad),     sizeof(Sorting),              sizeof(SortArgs),            sizeof(Entry),
                            sizeof(Terms),    sizeof(CatchUpArgs),              sizeof(MarkArgs),            sizeof(PoolArgs),
                            sizeof(DotArgs),  sizeof(LargestArgs),          sizeof(BagsArgs)};
    memcpy(sizes, all, sizeof(all));
}
