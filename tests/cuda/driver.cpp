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

// The kernels of candle that a lookup's backward pass and moved rows need, by the bytes of an element, for contiguous tensors.

template <typename T> void copy2d(void** args) {
    auto* from = *static_cast<const T**>(args[0]);
    auto* to = *static_cast<T**>(args[1]);
    uint32_t sizes[4];
    for (int i = 0; i < 4; i++) sizes[i] = *static_cast<uint32_t*>(args[2 + i]);
    for (uint32_t i = 0; i < sizes[0]; i++) memmove(to + size_t(i) * sizes[3], from + size_t(i) * sizes[2], sizes[1] * sizeof(T));
}

template <typename T> void const_set(void** args) {
    auto* to = *static_cast<T**>(args[4]);
    for (size_t i = 0; i < *static_cast<size_t*>(args[0]); i++) to[i] = *static_cast<T*>(args[3]);
}

template <typename T> void badd(void** args) {
    typedef typename Element<T>::Acc A;
    if (*static_cast<void**>(args[2]) != nullptr) {
        fprintf(stderr, "the make-believe GPU adds contiguous tensors only\n");
        abort();
    }
    auto *a = *static_cast<const T**>(args[3]), *b = *static_cast<const T**>(args[4]);
    auto* to = *static_cast<T**>(args[5]);
    for (size_t i = 0; i < *static_cast<size_t*>(args[0]); i++) {
        to[i] = Element<T>::narrow(A(Element<T>::widen(a[i]) + Element<T>::widen(b[i])));
    }
}

const std::map<std::string, void (*)(void**)> OF_CANDLE = {
    {"copy2d_u8", copy2d<u8>},        {"copy2d_bf16", copy2d<u16>},    {"copy2d_f16", copy2d<u16>},
    {"copy2d_i16", copy2d<u16>},      {"copy2d_u32", copy2d<u32>},     {"copy2d_f32", copy2d<u32>},
    {"copy2d_f64", copy2d<u64>},      {"const_set_bf16", const_set<u16>}, {"const_set_f16", const_set<u16>},
    {"const_set_f32", const_set<u32>}, {"const_set_f64", const_set<u64>}, {"badd_bf16", badd<bf16>},
    {"badd_f16", badd<f16>},          {"badd_f32", badd<float>},       {"badd_f64", badd<double>},
};

// What a handle of a function stands for.
struct Function {
    void* ours;
    void (*of_candle)(void**);
};

} // namespace

#pragma GCC visibility push(default)
extern "C" {

int cuInit(unsigned) { return 0; }
// What the vendor's own libraries ask for; they do without where there is none.
int cuGetExportTable(const void** table, const void*) { return *table = nullptr, 34; }
int cuGetProcAddress_v2(const char*, void** function, int, uint64_t, void*) { return *function = nullptr, 34; }
int cuDriverGetVersion(int* version) { return *version = 0, 34; }
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
// A GPU that is always behind, if asked for.
int cuEventQuery(void*) { return getenv("ADAMAX_LATE") != nullptr ? 600 : 0; }
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
    auto of_candle = OF_CANDLE.find(name);
    auto* found = new Function{dlsym(library, name), of_candle == OF_CANDLE.end() ? nullptr : of_candle->second};
    *function = found;
    bool is_there = found->ours != nullptr || found->of_candle != nullptr;
    if (!is_there) fprintf(stderr, "the make-believe GPU has no kernel %s\n", name);
    return is_there ? 0 : NOT_FOUND;
}
int cuLaunchKernel(
    void* function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned, void*, void** args, void**
) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (blocks == 0 || threads == 0) return 1;
    auto* called = static_cast<Function*>(function);
    if (called->of_candle != nullptr) return called->of_candle(args), 0;
    static bool reversed = getenv("ADAMAX_REVERSED") != nullptr;
    return host_launch(reinterpret_cast<void (*)(const void*)>(called->ours), blocks, threads, args[0], reversed) == 0 ? 0 : 719;
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
