// Resampling of position embeddings, on the CPU and on CUDA. Equations: vitkernels/reference/pos_embed.py.
#pragma once

#include <cstdint>
#include <vector>

#include "pos_embed.cuh"

namespace vitkernels {

enum class Dtype : int { float32 = 0, float16 = 1, bfloat16 = 2, float64 = 3 };

// One resampled copy: the first height x width positions of the source grid resampled to full_height x full_width.
struct Target {
    int height, width, full_height, full_width;
};

// A table (prefix + height * width rows of `channels`), and its copies at other sizes, stacked: copy k starts at row
// k * rows and is cut or filled with zero rows to `rows`; with rows = 0, copies follow each other as they are.
// Forward reads `table` and writes `copies`; backward reads `copies` and writes `table`. Both are contiguous.
struct Resampling {
    std::uintptr_t table, copies;
    Dtype dtype;
    int height, width;
    std::int64_t channels;
    int prefix;
    std::int64_t rows;
    Filter filter;
    std::vector<Target> targets;
};

// First row of each copy and, in the end, the number of rows.
std::vector<std::int64_t> first_rows(const Resampling& problem);

// With at most `threads` threads, the calling one included: results do not depend on their number. And with vectors of at most
// `vector_bits`, where the CPU has them: AVX-512, AVX2 or portable code, of which tests run each.
void resample_forward_cpu(const Resampling& problem, int threads, int vector_bits = 512);
void resample_backward_cpu(const Resampling& problem, int threads, int vector_bits = 512);

// On a stream of a device. std::runtime_error with CUDA's message when a launch fails.
void resample_forward_cuda(const Resampling& problem, int device, std::uintptr_t stream);
void resample_backward_cuda(const Resampling& problem, int device, std::uintptr_t stream);

}  // namespace vitkernels
