// A make-believe driver: what cudarc asks of libcuda, with host memory for a GPU's and with the kernels of `cuda/` run as
// host.h runs them. With it `tests/gpu.rs` runs where there is no GPU, but for what needs kernels of candle's own:
// `tests/cuda/run.sh` builds it. Everything happens at once and in order, so neither streams nor speed are tested.
//
// Memory is filled with a pattern that is no sensible number when it is allocated, and has guards on both sides that are
// looked at when it is freed.
#include "host.cpp"

#include <dlfcn.h>
#include <map>
#include <mutex>
#include <string>

namespace {

constexpr int NOT_FOUND = 500;
constexpr size_t GUARD = 256;
constexpr unsigned char PATTERN = 0xcd, GUARDED = 0xfb;

std::recursive_mutex lock;
std::map<uint64_t, size_t> sizes;

uint64_t allocate(size_t bytes) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    auto* base = static_cast<unsigned char*>(aligned_alloc(GUARD, (bytes + 3 * GUARD) / GUARD * GUARD));
    memset(base, GUARDED, bytes + 2 * GUARD);
    memset(base + GUARD, PATTERN, bytes);
    auto address = reinterpret_cast<uint64_t>(base + GUARD);
    sizes[address] = bytes;
    return address;
}

void release(uint64_t address) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    auto found = sizes.find(address);
    if (found == sizes.end()) {
        fprintf(stderr, "freed what was not allocated\n");
        abort();
    }
    auto* base = reinterpret_cast<unsigned char*>(address) - GUARD;
    for (size_t i = 0; i < GUARD; i++) {
        if (base[i] != GUARDED || base[GUARD + found->second + i] != GUARDED) {
            fprintf(stderr, "written outside of %zu bytes of memory\n", found->second);
            abort();
        }
    }
    sizes.erase(found);
    free(base);
}

// The bytes from an address to the end of its memory.
void check_range(uint64_t address, size_t bytes) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    auto after = sizes.upper_bound(address);
    if (bytes == 0) return;
    if (after == sizes.begin() || address + bytes > std::prev(after)->first + std::prev(after)->second) {
        fprintf(stderr, "a copy of %zu bytes outside of memory\n", bytes);
        abort();
    }
}

} // namespace

#pragma GCC visibility push(default)
extern "C" {

int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal == 0 ? 0 : 101; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGetName(char* name, int length, int) { return snprintf(name, size_t(length), "a make-believe GPU"), 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    // Compute capability 9.0; everything else is there.
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 1;
    return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &lock, 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxDestroy_v2(void*) { return 0; }
int cuCtxGetCurrent(void** context) { return *context = &lock, 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxSynchronize() { return 0; }
int cuGetErrorString(int error, const char** text) { return *text = error == NOT_FOUND ? "no such kernel" : "an error", 0; }

int cuStreamCreate(void** stream, unsigned) { return *stream = new int, 0; }
int cuStreamDestroy_v2(void* stream) { return delete static_cast<int*>(stream), 0; }
int cuStreamSynchronize(void*) { return 0; }
int cuStreamWaitEvent(void*, void*, unsigned) { return 0; }
int cuStreamIsCapturing(void*, int* status) { return *status = 0, 0; }
int cuEventCreate(void** event, unsigned) { return *event = new int, 0; }
int cuEventDestroy_v2(void* event) { return delete static_cast<int*>(event), 0; }
int cuEventRecord(void*, void*) { return 0; }
int cuEventQuery(void*) { return 0; }
int cuEventSynchronize(void*) { return 0; }
int cuEventElapsedTime_v2(float* ms, void*, void*) { return *ms = 0, 0; }

int cuMemAllocAsync(uint64_t* address, size_t bytes, void*) { return *address = allocate(bytes), 0; }
int cuMemAlloc_v2(uint64_t* address, size_t bytes) { return cuMemAllocAsync(address, bytes, nullptr); }
int cuMemFreeAsync(uint64_t address, void*) { return release(address), 0; }
int cuMemFree_v2(uint64_t address) { return release(address), 0; }
int cuMemHostAlloc(void** memory, size_t bytes, unsigned) { return *memory = malloc(bytes), 0; }
int cuMemFreeHost(void* memory) { return free(memory), 0; }
int cuMemGetInfo_v2(size_t* free, size_t* total) { return *free = *total = size_t(1) << 34, 0; }

int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void*) {
    check_range(to, bytes);
    return memcpy(reinterpret_cast<void*>(to), from, bytes), 0;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void*) {
    check_range(from, bytes);
    return memcpy(to, reinterpret_cast<void*>(from), bytes), 0;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void*) {
    check_range(from, bytes);
    check_range(to, bytes);
    return memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes), 0;
}
int cuMemcpyPeerAsync(uint64_t to, void*, uint64_t from, void*, size_t bytes, void* stream) {
    return cuMemcpyDtoDAsync_v2(to, from, bytes, stream);
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void*) {
    check_range(to, bytes);
    return memset(reinterpret_cast<void*>(to), value, bytes), 0;
}

int cuModuleLoad(void** module, const char*) { return *module = new int, 0; }
int cuModuleLoadData(void** module, const void*) { return *module = new int, 0; }
int cuModuleUnload(void* module) { return delete static_cast<int*>(module), 0; }
int cuModuleGetFunction(void** function, void*, const char* name) {
    Dl_info own;
    dladdr(reinterpret_cast<void*>(&cuInit), &own);
    static void* library = dlopen(own.dli_fname, RTLD_NOW);
    *function = dlsym(library, name);
    if (*function == nullptr) fprintf(stderr, "the make-believe GPU has no kernel %s\n", name);
    return *function == nullptr ? NOT_FOUND : 0;
}
int cuLaunchKernel(
    void* function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned, void*, void** args, void**
) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (blocks == 0 || threads == 0) return 1;
    static bool reversed = getenv("ADAMAX_REVERSED") != nullptr;
    return host_launch(reinterpret_cast<void (*)(const void*)>(function), blocks, threads, args[0], reversed) == 0 ? 0 : 719;
}

int cublasCreate_v2(void** handle) { return *handle = &lock, 0; }
int cublasDestroy_v2(void*) { return 0; }
int cublasSetStream_v2(void*, void*) { return 0; }
int cublasGemmStridedBatchedEx() { return 15; }
int cublasDgemmStridedBatched() { return 15; }
int curandCreateGenerator(void** generator, int) { return *generator = &lock, 0; }
int curandDestroyGenerator(void*) { return 0; }
int curandSetStream(void*, void*) { return 0; }
int curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) { return 0; }

} // extern "C"
#pragma GCC visibility pop
