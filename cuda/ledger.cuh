// The updates that rows have missed: src/ledger.rs, statement for statement; the reasons are there.
#pragma once

#include "rule.cuh"

constexpr u32 TERMS = 6;

// One update of the table.
struct Entry {
    double sums[TERMS];
    double log_decay;
    u64 shrunk;
    double step_size;
    double decay;
    double powers[2]; // beta1^k and beta2^k, where k is the number of the entry
};

// What is the same for all rows.
struct Terms {
    double beta1;
    double beta2;
    double eps_inside;
    double eps_outside;
    double smallest_u;
    u64 window;
};

// e to the power of a number that is not positive.
DEVICE double exp_of(double x) {
    if (x == 0.0) return 1.0;
    if (x < -708.0) return 0.0;
    i64 k = i64(x * 1.44269504088896340735992468100189214 - 0.5);
    double r = (x - double(k) * 6.931471803691238e-1) - double(k) * 1.9082149292705877e-10;
    double sum = 1.0;
#pragma unroll
    for (u32 n = 14; n >= 1; n--) sum = 1.0 + r * sum * (1.0 / double(n));
    return sum * double_of_bits(u64(k + 1023) << 52);
}

// The updates from `since` to `now` that a row has missed, in the type of the arithmetic.
template <typename A> struct Missed {
    A decay;
    A sums[TERMS];
    A beta1, beta2, each_beta1, each_beta2, eps_inside, eps_outside, smallest_u;
    u64 shrunk;
    const Entry* missed; // the updates since
    u64 n, window;

    DEVICE Missed of(const Entry* entries, const Terms& terms, u32 since, u32 now) {
        const Entry& entry = entries[since];
        const Entry& last = entries[now];
        const Entry& between = entries[now - since];
        double decay = exp_of(last.log_decay - entry.log_decay);
        Missed d;
        d.decay = A(decay);
#pragma unroll
        for (u32 i = 0; i < TERMS; i++) d.sums[i] = A(entry.sums[i] * decay);
        d.beta1 = A(between.powers[0]);
        d.beta2 = A(between.powers[1]);
        d.each_beta1 = A(terms.beta1);
        d.each_beta2 = A(terms.beta2);
        d.eps_inside = A(terms.eps_inside);
        d.eps_outside = A(terms.eps_outside);
        d.smallest_u = A(terms.smallest_u);
        d.shrunk = last.shrunk - entry.shrunk;
        d.missed = entries + since + 1;
        d.n = now - since;
        d.window = terms.window;
        return d;
    }

    // The shrunken moments.
    __device__ __forceinline__ A first_moment(A m) const { return m * beta1; }
    __device__ __forceinline__ A norm(A u) const {
        A shrunk = rule::maximum(u * beta2, eps_inside);
        return u == A(0) ? A(0) : shrunk;
    }

    // Whether the series suffices for an element.
    __device__ __forceinline__ bool is_series(A m, A u) const { return u >= smallest_u || m == A(0); }

    // The weight, where the series suffices.
    __device__ __forceinline__ A weight(A w, A m, A u) const {
        A denominator = u + eps_outside;
        A ratio = denominator == A(0) ? A(0) : m / denominator;
        A y = denominator == A(0) ? A(0) : eps_outside / denominator;
        A sum = sums[TERMS - 1];
#pragma unroll
        for (i32 i = i32(TERMS) - 2; i >= 0; i--) sum = sums[i] - y * sum;
        A moved = ratio == A(0) ? A(0) : ratio * sum;
        return decay * w - moved;
    }

    // The weight, update by update.
    __device__ __noinline__ A weight_one_by_one(A w, A m, A u) const {
        u64 within = n < window ? n : window;
        for (u64 i = 0; i < within; i++) {
            m = each_beta1 * m;
            u = rule::maximum(each_beta2 * u, eps_inside);
            A denominator = u + eps_outside;
            A ratio = denominator == A(0) ? A(0) : m / denominator;
            w = w - A(missed[i].decay) * w - A(missed[i].step_size) * ratio;
        }
        // Behind the window nothing but decay is left.
        const Entry* last = missed + n - 1;
        const Entry* window_end = missed + i64(within) - 1;
        return n > within ? w * A(exp_of(last->log_decay - window_end->log_decay)) : w;
    }

    __device__ __forceinline__ A weight(bool by_series, A w, A m, A u) const {
        return by_series ? weight(w, m, u) : weight_one_by_one(w, m, u);
    }
};
