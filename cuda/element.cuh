// The element types of parameters and gradients, and the type each is computed in: src/element.rs, statement for
// statement. Also plain C++: the tests compile it for the host and compare it with the Rust file, bit for bit.
//
// No header is included: NVRTC finds none. The names of integers are Rust's.
#pragma once

// A file of kernels uses some of what the headers have, and not the rest.
#pragma nv_diag_suppress 177

typedef signed char i8;
typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__

DEVICE u32 to_bits(float x) { return __float_as_uint(x); }
DEVICE float from_bits(u32 bits) { return __uint_as_float(bits); }
DEVICE double double_of_bits(u64 bits) { return __longlong_as_double(i64(bits)); }

constexpr u32 INFINITE = 0x7f800000;

DEVICE bool is_nan(float x) { return x != x; }

// The value of a bf16's bits.
DEVICE float bf16_to_f32(u32 bits) { return from_bits(bits << 16); }

// The bits of the nearest bf16.
DEVICE u32 f32_to_bf16(float x) {
    u32 bits = to_bits(x);
    u32 rounded = (bits + (0x7fff + ((bits >> 16) & 1))) >> 16;
    u32 nan = (bits >> 16) | 0x0040;
    return is_nan(x) ? nan : rounded;
}

// The value of an f16's bits.
DEVICE float f16_to_f32(u32 bits) {
#ifdef __CUDA_ARCH__
    // One instruction; what is below is for the host. They differ in what they leave of a NaN, of which nothing is promised.
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(u16(bits)));
    return x;
#else
    constexpr u32 infinite = 0x7c00u << 13;
    constexpr float smallest_normal = 6.1035156e-5f; // 2^-14
    u32 sign = (bits & 0x8000) << 16;
    u32 magnitude = (bits & 0x7fff) << 13;
    u32 normal = magnitude + ((127 - 15) << 23);
    u32 subnormal = to_bits(from_bits(magnitude + (113 << 23)) - smallest_normal);
    u32 special = magnitude | INFINITE;
    u32 finite = magnitude < (1u << 23) ? subnormal : normal;
    return from_bits(sign | (magnitude >= infinite ? special : finite));
#endif
}

// The bits of the nearest f16.
DEVICE u32 f32_to_f16(float x) {
#ifdef __CUDA_ARCH__
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    constexpr u32 overflow = 0x47800000;        // 2^16
    constexpr u32 smallest_normal = 0x38800000; // 2^-14
    constexpr u32 half = 0x3f000000;            // 0.5
    u32 sign = (to_bits(x) >> 16) & 0x8000;
    u32 magnitude = to_bits(x) & 0x7fffffff;
    u32 normal = (magnitude + (((15u - 127u) << 23) + 0xfff) + ((magnitude >> 13) & 1)) >> 13;
    u32 subnormal = to_bits(from_bits(magnitude) + 0.5f) - half;
    u32 finite = magnitude < smallest_normal ? subnormal : normal;
    u32 special = magnitude > INFINITE ? 0x7e00 : 0x7c00;
    return sign | (magnitude >= overflow ? special : finite);
#endif
}

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

// `Acc` is the type of the arithmetic on an element, which is also the type of its moments.
template <typename T> struct Element;

template <> struct Element<double> {
    typedef double Acc;
    DEVICE double widen(double x) { return x; }
    DEVICE double narrow(double x) { return x; }
};
template <> struct Element<float> {
    typedef float Acc;
    DEVICE float widen(float x) { return x; }
    DEVICE float narrow(float x) { return x; }
};
template <> struct Element<f16> {
    typedef float Acc;
    DEVICE float widen(f16 x) { return f16_to_f32(x.bits); }
    DEVICE f16 narrow(float x) { return f16{u16(f32_to_f16(x))}; }
};
template <> struct Element<bf16> {
    typedef float Acc;
    DEVICE float widen(bf16 x) { return bf16_to_f32(x.bits); }
    DEVICE bf16 narrow(float x) { return bf16{u16(f32_to_bf16(x))}; }
};


template <typename T, typename U> struct Same {
    static constexpr bool value = false;
};
template <typename T> struct Same<T, T> {
    static constexpr bool value = true;
};
