// Which source positions a resampled position reads, and with what weights: one code for the CPU and the CUDA kernel.
// PyTorch's F.interpolate in float32 (aten/src/ATen/native/UpSample.h): positions and weights in its order of rounding, with
// the fused multiply-adds that its compilers make of the polynomials. With antialias they are its weights bit for bit.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define VITKERNELS_SHARED __host__ __device__ inline
#else
#define VITKERNELS_SHARED inline
#endif

namespace vitkernels {

struct Filter {
    bool cubic, antialias, align_corners;
};

// One axis of a resampling, `in` positions to `out`.
struct Axis {
    Filter filter;
    int in, out;
    float scale, support, inverse;  // support: half the width of the filter in source positions; inverse: 1 / its stretch
    int taps;                       // the most source positions that one output reads
};

// The source positions first .. first + count - 1 that an output reads.
struct Window {
    int first, count;
};

VITKERNELS_SHARED int smaller(int a, int b) { return a < b ? a : b; }
VITKERNELS_SHARED int larger(int a, int b) { return a > b ? a : b; }
VITKERNELS_SHARED int clamp_to(int position, int size) { return larger(0, smaller(position, size - 1)); }

// A compiler may contract a * b + c, and then positions would round differently on each side. On the host,
// -ffp-contract=off forbids it.
VITKERNELS_SHARED float product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

VITKERNELS_SHARED Axis make_axis(Filter filter, int in, int out) {
    Axis axis{filter, in, out, 0.0f, 0.0f, 1.0f, 0};
    if (!filter.align_corners) {
        axis.scale = static_cast<float>(in) / static_cast<float>(out);
    } else if (out > 1) {
        axis.scale = static_cast<float>(in - 1) / static_cast<float>(out - 1);
    }
    if (!filter.antialias) {
        axis.taps = smaller(filter.cubic ? 4 : 2, in);
        return axis;
    }
    const float half = filter.cubic ? 2.0f : 1.0f;
    axis.support = axis.scale >= 1.0f ? half * axis.scale : half;
    axis.inverse = axis.scale >= 1.0f ? 1.0f / axis.scale : 1.0f;
    axis.taps = smaller(2 * static_cast<int>(ceilf(axis.support)) + 1, in);
    return axis;
}

// Keys' cubic kernel with parameter a, R. Keys 1981: |x| <= 1, and 1 <= |x| <= 2.
VITKERNELS_SHARED float cubic_near(float x, float a) {
    return fmaf(product(fmaf(a + 2.0f, x, -(a + 3.0f)), x), x, 1.0f);
}
VITKERNELS_SHARED float cubic_far(float x, float a) { return fmaf(fmaf(fmaf(a, x, -5.0f * a), x, 8.0f * a), x, -4.0f * a); }

VITKERNELS_SHARED float antialias_filter(float x, bool cubic) {
    x = fabsf(x);
    if (!cubic) return x < 1.0f ? 1.0f - x : 0.0f;
    if (x < 1.0f) return cubic_near(x, -0.5f);
    return x < 2.0f ? cubic_far(x, -0.5f) : 0.0f;
}

// Where the filter of output `i` stands, and its weight before normalisation.
struct AntialiasWindow {
    Window window;
    float center;
};

VITKERNELS_SHARED AntialiasWindow antialias_window(const Axis& axis, int i) {
    const float center = product(axis.scale, static_cast<float>(i) + 0.5f);
    const int first = larger(static_cast<int>(center - axis.support + 0.5f), 0);
    const int end = smaller(static_cast<int>(center + axis.support + 0.5f), axis.in);
    return {{first, larger(0, smaller(end - first, axis.taps))}, center};
}

VITKERNELS_SHARED float antialias_weight(const Axis& axis, float center, int source) {
    const float offset = static_cast<float>(source) - center;
    return antialias_filter(fmaf(offset, axis.inverse, 0.5f * axis.inverse), axis.filter.cubic);  // (offset + 0.5) * inverse
}

// Positions beyond the border count as the border, so their weights are added to its.
VITKERNELS_SHARED Window point_window(const Axis& axis, int i, float* weights) {
    const Filter filter = axis.filter;
    float position = product(axis.scale, static_cast<float>(i));
    if (!filter.align_corners) {
        position = fmaf(axis.scale, static_cast<float>(i) + 0.5f, -0.5f);
        if (!filter.cubic && position < 0.0f) position = 0.0f;
    }
    const int base = smaller(static_cast<int>(floorf(position)), axis.in - 1);
    const float t = fminf(fmaxf(position - static_cast<float>(base), 0.0f), 1.0f), u = 1.0f - t;
    float values[4] = {u, t, 0.0f, 0.0f};
    if (filter.cubic) {
        values[0] = cubic_far(t + 1.0f, -0.75f), values[1] = cubic_near(t, -0.75f);
        values[2] = cubic_near(u, -0.75f), values[3] = cubic_far(u + 1.0f, -0.75f);
    }
    const int start = filter.cubic ? base - 1 : base, size = filter.cubic ? 4 : 2;
    const int first = clamp_to(start, axis.in);
    const Window window{first, clamp_to(start + size - 1, axis.in) - first + 1};
    for (int j = 0; j < window.count; ++j) weights[j] = 0.0f;
    for (int j = 0; j < size; ++j) weights[clamp_to(start + j, axis.in) - first] += values[j];
    return window;
}

// What output `i` reads; the weights go to weights[0 .. count - 1].
VITKERNELS_SHARED Window make_window(const Axis& axis, int i, float* weights) {
    if (!axis.filter.antialias) return point_window(axis, i, weights);
    const AntialiasWindow found = antialias_window(axis, i);
    float total = 0.0f;
    for (int j = 0; j < found.window.count; ++j) {
        weights[j] = antialias_weight(axis, found.center, found.window.first + j);
        total += weights[j];
    }
    for (int j = 0; total != 0.0f && j < found.window.count; ++j) weights[j] /= total;
    return found.window;
}

// The weight with which output `i` reads `source`: the same bits as make_window's, and zero outside of the window.
VITKERNELS_SHARED float weight_of(const Axis& axis, int i, int source) {
    if (!axis.filter.antialias) {
        float weights[4];
        const Window window = point_window(axis, i, weights);
        const int j = source - window.first;
        float weight = 0.0f;
        for (int k = 0; k < 4; ++k) weight = k == j && k < window.count ? weights[k] : weight;  // no indexed registers
        return weight;
    }
    const AntialiasWindow found = antialias_window(axis, i);
    if (source < found.window.first || source >= found.window.first + found.window.count) return 0.0f;
    float total = 0.0f;
    for (int j = 0; j < found.window.count; ++j) total += antialias_weight(axis, found.center, found.window.first + j);
    const float weight = antialias_weight(axis, found.center, source);
    return total != 0.0f ? weight / total : weight;
}

}  // namespace vitkernels
