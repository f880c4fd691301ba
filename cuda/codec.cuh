// How moments are stored in 4 and in 2 bytes: src/codec, statement for statement; the reasons are there.
#pragma once

#include "element.cuh"
#include "ledger.cuh"
#include "rounding.cuh"
#include "rule.cuh"

// The largest quotient there can be, in the forms that codes need.
struct Limits {
    float limit;
    float per_code;
    float codes;
};

// === Units: src/codec/unit.rs ===

constexpr u32 POINT = 24;
constexpr i64 BIAS = 126;

// `2^exponent`; 0 below f32's smallest normal number.
DEVICE float power_of_two(i64 exponent) {
    return exponent < -126 ? 0.0f : from_bits(u32((exponent < 127 ? exponent : 127) + 127) << 23);
}

// A unit, `2^L`, of its stored logarithm.
DEVICE float scale_of(u32 log) {
    double fraction = double(log & ((1u << POINT) - 1)) / double(1u << POINT);
    double y = (fraction - 0.5) * 0.693147180559945309417232121458;
    double sum = 1.0;
    sum = 1.0 + y * sum * (1.0 / 8.0);
    sum = 1.0 + y * sum * (1.0 / 7.0);
    sum = 1.0 + y * sum * (1.0 / 6.0);
    sum = 1.0 + y * sum * (1.0 / 5.0);
    sum = 1.0 + y * sum * (1.0 / 4.0);
    sum = 1.0 + y * sum * (1.0 / 3.0);
    sum = 1.0 + y * sum * (1.0 / 2.0);
    sum = 1.0 + y * sum * (1.0 / 1.0);
    return float(1.41421356237309504880168872421 * sum) * power_of_two(i64(log >> POINT) - BIAS);
}

struct Moved {
    u32 log;
    float rebase;
};

// A unit's logarithm after `shrink`, raised so far that `largest` fits; and what stored values are multiplied with then.
template <typename F> DEVICE Moved move_unit(u32 log, u64 shrink, float largest) {
    i64 shrunk = i64(log) - i64(shrink);
    i64 whole = shrunk >> POINT;
    i64 wanted = BIAS;
    if (F::HAS_TOP) {
        i64 e = i64(to_bits(largest) >> 23) - 127;
        wanted = e + 1 - F::TOP + BIAS;
        wanted = wanted < 0 ? 0 : wanted > BIAS + 126 ? BIAS + 126 : wanted;
    }
    i64 octaves = wanted - whole > 0 ? wanted - whole : 0;
    return Moved{u32(shrunk + i64(u64(octaves) << POINT)), power_of_two(-octaves)};
}

// === Formats: src/codec/format.rs ===

// m, from the quotient.
DEVICE float moment_of(float ratio, float denominator) {
    float m = ratio * denominator;
    return denominator < from_bits(INFINITE) ? rule::clamp(m, from_bits(0x7f7fffff)) : m;
}

// What is stored of m.
DEVICE float storable(float m, float ratio) {
    return abs_of(m) == from_bits(INFINITE) ? (m > 0.0f ? 1.0f : -1.0f) : ratio;
}

// m and u themselves.
template <typename A> struct Plain {
    typedef A Code;
    typedef A Norm;
    static constexpr bool IS_CODED = false;

    DEVICE A load(A code, const Limits&) { return code; }
    DEVICE A decode(A stored, A) { return stored; }
    DEVICE A encode(A m, A, const Limits&, u32) { return m; }
};

// 4 bytes an element.
template <typename H> struct Halves {
    typedef u16 Code;
    typedef u16 Norm;
    static constexpr bool IS_CODED = true;
    static constexpr float UP = 1.0f;
    static constexpr float GAIN = 1.0f;
    static constexpr bool HAS_SMALLEST = false;
    static constexpr u16 FIRST_SPECIAL = Same<H, f16>::value ? 0x7c00 : 0x7f80;

    DEVICE float load(u16 code, const Limits&) { return Half<H>::widen_bits(code); }
    DEVICE float decode(float stored, float denominator) { return moment_of(stored, denominator); }
    DEVICE float load_plain(u16 code) { return Half<H>::widen_bits(code); }
    DEVICE float plain_unit(const Limits&) { return 1.0f; }
    DEVICE u16 encode(float m, float ratio, const Limits&, u32 random) {
        return u16(Half<H>::stochastic(storable(m, ratio), random));
    }
    DEVICE u16 encode_plain(float ratio, const Limits&, u32 random) {
        return u16(Half<H>::stochastic_plain(ratio, random));
    }

    DEVICE float norm(u32 code) { return Half<H>::widen_bits(code); }
    DEVICE float norm_plain(u16 code) { return Half<H>::widen_bits(code); }
    DEVICE u32 encode_norm(float v) {
        u32 finite = Half<H>::nearest_plain(v);
        finite = v > 0.0f && finite == 0 ? 1 : finite;
        return v < from_bits(INFINITE) ? finite : Half<H>::nearest(v);
    }
    DEVICE float round_plain_norm(float v, u16& code) {
        u32 wide = Half<H>::nearest_plain(v);
        code = u16(wide);
        return Half<H>::widen_bits(wide);
    }
    DEVICE bool is_special(u16 code) { return code >= FIRST_SPECIAL; }
    DEVICE float bound(float ratio, const Limits&) { return ratio; }
};

struct Bf16 : Halves<bf16> {
    static constexpr bool HAS_TOP = false;
    static constexpr i64 TOP = 0;
};
struct F16 : Halves<f16> {
    static constexpr bool HAS_TOP = true;
    static constexpr i64 TOP = 15;
};

// 2 bytes an element.
struct Q8 {
    typedef i8 Code;
    typedef u8 Norm;
    static constexpr bool IS_CODED = true;
    static constexpr bool HAS_TOP = true;
    static constexpr i64 TOP = 0;
    static constexpr float UP = 1.0f + 1.0f / 8192.0f;
    static constexpr float GAIN = 1.0458f;
    static constexpr bool HAS_SMALLEST = true;
    static constexpr i32 NOT_A_NUMBER = -128;
    static constexpr u32 FINITE = 253;
    static constexpr u32 FIRST_SPECIAL = 254;
    static constexpr u32 UNDER = 0x000fffff;
    static constexpr u32 LOWEST_BITS = (127 - 31) << 3;

    DEVICE float load_plain(i8 code) { return float(i32(code)); }
    DEVICE float load(i8 code, const Limits& limits) {
        float ratio = load_plain(code) * limits.per_code;
        return code == NOT_A_NUMBER ? from_bits(0x7fc00000) : ratio;
    }
    DEVICE float decode(float stored, float denominator) { return moment_of(stored, denominator); }
    DEVICE float plain_unit(const Limits& limits) { return limits.per_code; }
    DEVICE i8 encode_plain(float gained, const Limits& limits, u32 random) {
        constexpr float round = 12582912.0f * TWO_32;
        return i8(u8(to_bits((gained * limits.codes + centered(random)) + round)));
    }
    DEVICE i8 encode(float m, float ratio, const Limits& limits, u32 random) {
        ratio = storable(m, ratio);
        i8 code = encode_plain(ratio * GAIN, limits, random);
        return is_nan(ratio) ? i8(NOT_A_NUMBER) : code;
    }

    DEVICE float norm(u32 code) {
        float special = code == FIRST_SPECIAL ? from_bits(INFINITE) : from_bits(0x7fc00000);
        return code > FINITE ? special : from_bits((code + LOWEST_BITS) << 20);
    }
    DEVICE float norm_plain(u8 code) { return from_bits((u32(code) + LOWEST_BITS) << 20); }
    DEVICE u32 encode_norm(float v) {
        u32 special = v == from_bits(INFINITE) ? FIRST_SPECIAL : FIRST_SPECIAL + 1;
        u32 up = (to_bits(v) + UNDER) >> 20;
        u32 finite = (up > LOWEST_BITS ? up : LOWEST_BITS) - LOWEST_BITS;
        finite = finite < FINITE ? finite : FINITE;
        return to_bits(v) >= INFINITE ? special : finite;
    }
    DEVICE float round_plain_norm(float v, u8& code) {
        u32 up = to_bits(v) + UNDER;
        code = u8((up >> 20) - LOWEST_BITS);
        return from_bits(up & ~UNDER);
    }
    DEVICE bool is_special(u8 code) { return code > FINITE; }
    DEVICE float bound(float ratio, const Limits& limits) { return rule::clamp(ratio, limits.limit); }
};

// === One update: src/codec/update.rs ===

// What u of a block is compared with, as the bits of numbers that are not negative.
struct Largest {
    u32 finite; // the largest that is finite
    bool is_all; // whether all are
};

// Whether the largest magnitude of the gradients tells the largest that is seen, without the weights; and that one.
DEVICE bool largest_of(const Coefficients<float>& c, u32 magnitude, Largest& largest) {
    float seen = rule::magnitude(c, rule::gradient(c, 0.0f, from_bits(magnitude)));
    largest.finite = to_bits(seen);
    largest.is_all = true;
    return c.l2 == 0.0f && magnitude < INFINITE && seen < from_bits(INFINITE);
}

// Otherwise: one more element.
DEVICE void look(const Coefficients<float>& c, float w, float grad, Largest& largest) {
    u32 seen = to_bits(rule::magnitude(c, rule::gradient(c, w, grad)));
    largest.is_all = largest.is_all && seen < INFINITE;
    seen = seen < INFINITE ? seen : 0;
    largest.finite = seen > largest.finite ? seen : largest.finite;
}

// What all elements of a block have in common in one update.
template <typename F> struct Block {
    Coefficients<float> c;
    Limits limits;
    u32 key;
    float before, after, rebase;
    // Of `update`.
    float per_unit;
    // Of `update_plain`.
    float unit_m, eps_m, scale_m, scale_v, eps_v, unit_u, eps_u;

    DEVICE Block of(const Coefficients<float>& c, const Limits& limits, u32 key, u32 log, Moved moved) {
        Block b;
        b.c = c;
        b.limits = limits;
        b.key = key;
        b.before = scale_of(log);
        b.after = scale_of(moved.log);
        b.rebase = moved.rebase;
        b.per_unit = F::UP / b.after;
        b.unit_m = b.before * F::plain_unit(limits) * c.beta1;
        b.eps_m = c.eps_outside * F::plain_unit(limits) * c.beta1;
        b.scale_m = c.grad_scale * c.one_minus_beta1;
        b.scale_v = abs_of(c.grad_scale) * b.per_unit;
        b.eps_v = c.eps_inside * b.per_unit;
        b.unit_u = b.after / F::GAIN;
        b.eps_u = c.eps_outside / F::GAIN;
        return b;
    }

    // Whether `update_plain` may be used; `has_special` is whether any norm of the block is infinite or NaN.
    __device__ __forceinline__ bool is_plain(const Largest& largest, bool has_special) const {
        constexpr float low = 1e-12f, high = 1e12f;
        float scale = abs_of(c.grad_scale);
        bool has_no_terms = c.l2 == 0.0f && c.clamp == from_bits(INFINITE) && scale >= low && scale < high;
        bool no_zero = c.eps_outside > 0.0f || F::HAS_SMALLEST;
        bool in_range = rebase == 1.0f && largest.is_all && from_bits(largest.finite) < 1e12f && after >= low && after < high;
        return has_no_terms && no_zero && in_range && !has_special;
    }

    // Any case.
    __device__ __forceinline__ void update(float& w, float grad, typename F::Code& moment, typename F::Norm& norm, u32 i) const {
        float stored = F::norm(norm);
        float m = F::decode(F::load(moment, limits), stored * before + c.eps_outside);
        float g = rule::gradient(c, w, grad);
        m = rule::first_moment(c, m, g);
        u32 code = F::encode_norm(rule::maximum(stored * rebase, rule::magnitude(c, g) * per_unit));
        float ratio = F::bound(rule::normalized(c, m, F::norm(code) * after), limits);
        w = rule::step_weight(c, w, F::bound(ratio * F::GAIN, limits));
        moment = F::encode(m, ratio, limits, random(key, i));
        norm = typename F::Norm(code);
    }

    // The same where nothing is special.
    template <bool DECAYS>
    __device__ __forceinline__ void update_plain(float& w, float grad, typename F::Code& moment, typename F::Norm& norm, u32 i) const {
        float kept = F::norm_plain(norm);
        float m = F::load_plain(moment) * (kept * unit_m + eps_m) + grad * scale_m;
        float seen = abs_of(grad) * scale_v + eps_v;
        float v = F::round_plain_norm(kept > seen ? kept : seen, norm);
        float gained = m / (v * unit_u + eps_u);
        float w_kept = DECAYS ? w - c.decay * w : w;
        w = w_kept - c.step_size * F::bound(gained, limits);
        moment = F::encode_plain(gained, limits, random(key, i));
    }
};

// One element of a row whose elements share one u, which was `before` and is `after`.
template <typename A, typename F>
DEVICE void update_of_row(
    const Coefficients<A>& c, const Limits& limits, u32 key, A& w, A grad, typename F::Code& moment, A before, A after, u32 i
) {
    A g = rule::gradient(c, w, grad);
    A m = rule::first_moment(c, F::decode(F::load(moment, limits), before + c.eps_outside), g);
    A ratio = rule::normalized(c, m, after);
    w = rule::step_weight(c, w, ratio);
    moment = F::encode(m, ratio, limits, random(key, i));
}

// === Catching up: src/codec/catch_up.rs ===

// Numbers that all elements of a row that catches up share, where each has a norm of its own.
template <typename F> struct PayBlock {
    Missed<float> missed;
    Limits limits;
    u32 key;
    float before, after, rebase;

    DEVICE PayBlock of(const Missed<float>& missed, const Limits& limits, u32 key, u32 log, Moved moved) {
        return PayBlock{missed, limits, key, scale_of(log), scale_of(moved.log), moved.rebase};
    }

    // u, and m with it.
    __device__ __forceinline__ float norm(typename F::Norm norm) const { return F::norm(norm) * before; }
    __device__ __forceinline__ float moment(typename F::Code moment, float u) const {
        return F::decode(F::load(moment, limits), u + missed.eps_outside);
    }

    __device__ __forceinline__ bool is_series(typename F::Code code, typename F::Norm norm_code) const {
        float u = norm(norm_code);
        return missed.is_series(moment(code, u), u);
    }

    __device__ __forceinline__ void catch_up(bool by_series, float& w, typename F::Code& code, typename F::Norm& norm_code, u32 i) const {
        float u = norm(norm_code);
        float m = moment(code, u);
        w = missed.weight(by_series, w, m * F::GAIN, u);
        m = missed.first_moment(m);
        u32 wide = F::encode_norm(F::norm(norm_code) * rebase);
        norm_code = typename F::Norm(wide);
        float denominator = F::norm(wide) * after + missed.eps_outside;
        float ratio = denominator == 0.0f ? 0.0f : m / denominator;
        code = F::encode(m, F::bound(ratio, limits), limits, random(key, i));
    }
};

// One element of a row whose elements share one u.
template <typename A, typename F>
DEVICE void catch_up_of_row(
    const Missed<A>& missed, const Limits& limits, u32 key, bool by_series, A& w, typename F::Code& moment, A before, A after, u32 i
) {
    A m = F::decode(F::load(moment, limits), before + missed.eps_outside);
    w = missed.weight(by_series, w, m, before);
    m = missed.first_moment(m);
    A denominator = after + missed.eps_outside;
    A ratio = denominator == A(0) ? A(0) : m / denominator;
    moment = F::encode(m, ratio, limits, random(key, i));
}
