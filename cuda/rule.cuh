// The formula: src/rule.rs, statement for statement; the reasons are there. Compiled without fused multiply-add, and
// with IEEE division, so that the bits are the CPU's.
#pragma once

#include "element.cuh"

template <typename A> struct Coefficients {
    A grad_scale;
    A clamp;
    A l2;
    A beta1;
    A one_minus_beta1;
    A beta2;
    A eps_inside;
    A eps_outside;
    A decay;
    A step_size;
};

DEVICE float abs_of(float x) { return from_bits(to_bits(x) & 0x7fffffff); }
DEVICE double abs_of(double x) { return fabs(x); }

namespace rule {

// `x` moved into `[-limit, limit]`; a NaN stays one.
template <typename A> DEVICE A clamp(A x, A limit) {
    x = limit < x ? limit : x;
    return -limit > x ? -limit : x;
}

// The larger one, or NaN if one is NaN.
template <typename A> DEVICE A maximum(A a, A b) { return (a > b || a != a) ? a : b; }

// The gradient that enters the moments: scaled, clamped, with L2's share of the weight.
template <typename A> DEVICE A gradient(const Coefficients<A>& c, A w, A grad) {
    A g = clamp(grad * c.grad_scale, c.clamp);
    return c.l2 == A(0) ? g : g + c.l2 * w;
}

// The new m.
template <typename A> DEVICE A first_moment(const Coefficients<A>& c, A m, A g) {
    return c.beta1 * m + c.one_minus_beta1 * g;
}

// What the decayed u is compared with.
template <typename A> DEVICE A magnitude(const Coefficients<A>& c, A g) { return abs_of(g) + c.eps_inside; }

// By how many step sizes the weight moves.
template <typename A> DEVICE A normalized(const Coefficients<A>& c, A m, A u) {
    A denominator = u + c.eps_outside;
    return denominator == A(0) ? A(0) : m / denominator;
}

// The new weight: decayed, and moved.
template <typename A> DEVICE A step_weight(const Coefficients<A>& c, A w, A normalized) {
    w = c.decay == A(0) ? w : w - c.decay * w;
    return w - c.step_size * normalized;
}

// One update of one element.
template <typename A> DEVICE void update(const Coefficients<A>& c, A& w, A grad, A& m, A& u) {
    A g = gradient(c, w, grad);
    m = first_moment(c, m, g);
    u = maximum(c.beta2 * u, magnitude(c, g));
    w = step_weight(c, w, normalized(c, m, u));
}

// One micro-step of gradient accumulation: the new sum.
template <typename A> DEVICE A accumulate(A unscale, A sum, A grad) { return sum + grad * unscale; }

// One step of the weights' exponential moving average.
template <typename A> DEVICE A average(A momentum, A one_minus_momentum, A average, A w) {
    if (momentum == A(0)) return w;
    if (one_minus_momentum == A(0)) return average;
    return momentum * average + one_minus_momentum * w;
}

} // namespace rule
