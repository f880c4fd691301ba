// Rounding of what is stored in fewer bits than it is computed in: src/rounding.rs, statement for statement.
#pragma once

#include "element.cuh"

// Mixes all bits of `x`.
DEVICE u64 mix(u64 x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// A key from a key and a number.
DEVICE u64 derive(u64 key, u64 number) {
    return mix(key + number * 0x9e3779b97f4a7c15ull + 0x9e3779b97f4a7c15ull);
}

// 32 random bits for element `i` of the block that has this key.
DEVICE u32 random(u32 key, u32 i) {
    u32 x = key + i * 0x9e3779b1u;
    return (x ^ (x >> 15)) * 0x846ca68bu;
}

constexpr float TWO_32 = 4294967296.0f;
constexpr float TWO_23 = 8388608.0f;
constexpr float TWO_24 = 16777216.0f;

// A random number between -2^31 and 2^31.
DEVICE float centered(u32 random) { return float(i32(random)); }

// A type of 16 bits that f32 is rounded to; `Rest` is what a master copy keeps beside the value.
template <typename H> struct Half;

template <> struct Half<bf16> {
    typedef i16 Rest;

    DEVICE float widen_bits(u32 bits) { return bf16_to_f32(bits); }
    DEVICE u32 nearest(float x) { return f32_to_bf16(x); }
    DEVICE u32 stochastic_plain(float x, u32 random) { return (to_bits(x) + (random >> 16)) >> 16; }

    DEVICE u32 stochastic(float x, u32 random) {
        u32 nan = (to_bits(x) >> 16) | 0x0040;
        return is_nan(x) ? nan : stochastic_plain(x, random);
    }

    DEVICE u32 nearest_plain(float x) { return (to_bits(x) + 0x8000) >> 16; }

    DEVICE void split(float x, bf16& value, i16& rest) {
        u32 bits = to_bits(x);
        u32 rounded = (bits + 0x8000) >> 16;
        u32 nan = (bits >> 16) | 0x0040;
        rest = is_nan(x) ? i16(0) : i16(u16(bits));
        value = bf16{u16(is_nan(x) ? nan : rounded)};
    }

    DEVICE float join(bf16 value, i16 rest) {
        u32 own = u32(value.bits) << 16;
        float joined = from_bits(own + u32(i32(rest)));
        // Somebody else wrote the value.
        return is_nan(joined) ? from_bits(own) : joined;
    }
};

constexpr u32 F16_BIAS = (15u - 127u) << 23;
constexpr u32 F16_NORMAL = 0x38800000; // 2^-14

template <> struct Half<f16> {
    typedef float Rest;

    DEVICE float widen_bits(u32 bits) { return f16_to_f32(bits); }
    DEVICE u32 nearest(float x) { return f32_to_f16(x); }

    DEVICE u32 subnormal(float x, u32 random) {
        float noise = centered(random ^ (1u << 31)) * (1.0f / TWO_32);
        float units = x * TWO_24 + noise;
        return to_bits((units > 0.0f ? units : 0.0f) + TWO_23) & 0x7ff;
    }

    DEVICE u32 stochastic_plain(float x, u32 random) {
        u32 sign = (to_bits(x) >> 16) & 0x8000;
        u32 magnitude = to_bits(x) & 0x7fffffff;
        u32 normal = (magnitude + F16_BIAS + (random >> 19)) >> 13;
        return sign | (magnitude < F16_NORMAL ? subnormal(from_bits(magnitude), random) : normal);
    }

    DEVICE u32 stochastic(float x, u32 random) {
        constexpr u32 overflow = 0x47800000; // 2^16
        u32 magnitude = to_bits(x) & 0x7fffffff;
        u32 sign = (to_bits(x) >> 16) & 0x8000;
        float units = from_bits(magnitude) * TWO_24;
        bool is_whole = magnitude < F16_NORMAL && (units + TWO_23) - TWO_23 == units;
        random = is_whole ? 1u << 31 : random;
        u32 finite = stochastic_plain(from_bits(magnitude), random);
        u32 special = magnitude > INFINITE ? 0x7e00 : 0x7c00;
        return sign | (magnitude >= overflow ? special : finite);
    }

    DEVICE u32 nearest_plain(float x) {
        u32 normal = (to_bits(x) + (F16_BIAS + 0x1000)) >> 13;
        float rounded = x + 0.5f;
        u32 up = rounded - 0.5f < x ? 1 : 0;
        u32 subnormal = to_bits(rounded) - to_bits(0.5f) + up;
        return to_bits(x) < F16_NORMAL ? subnormal : normal;
    }

    DEVICE void split(float x, f16& value, float& rest) {
        value = Element<f16>::narrow(x);
        rest = x;
    }

    DEVICE float join(f16 value, float rest) {
        float own = Element<f16>::widen(value);
        return Element<f16>::narrow(rest).bits == value.bits ? rest : own;
    }
};
