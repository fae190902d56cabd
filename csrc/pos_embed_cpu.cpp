// The CPU kernel: for a block of channels, rows first into a buffer that stays in the cache, then columns. F.interpolate works in
// this order too; with antialias our sums round as its own do, so results agree bit for bit. With two taps along each axis
// (bilinear without antialias) the buffer would cost more than it saves: there each output reads its four sources.
//
// Cost of h x w -> h' x w' with k taps: (h w' k + h' w' k) D multiply-adds, each with one load of a source in the L1 or L2 cache;
// the source is read and the copy written once. 14x14 -> 24x24 of 768: 2.8 M multiply-adds, 0.6 MB read, 1.8 MB written. At 16
// lanes and two loads a cycle that is 88 k cycles, and the floor is the stores.
#include <algorithm>
#include <array>
#include <atomic>
#include <exception>
#include <map>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <sys/mman.h>
#endif

#include "dtypes.cuh"
#include "pos_embed.h"

#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE inline
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#define VITKERNELS_X86 1
#endif

namespace vitkernels {

std::vector<std::int64_t> first_rows(const Resampling& problem) {
    std::vector<std::int64_t> rows{0};
    for (const Target& t : problem.targets) {
        const std::int64_t own = problem.prefix + std::int64_t{t.height} * t.width;
        rows.push_back(rows.back() + (problem.rows ? problem.rows : own));
    }
    return rows;
}

namespace {

constexpr std::int64_t kBlock = 64;           // channels of a task: 256 bytes, the buffer of 16x37 positions is 150 kB
constexpr double kParallelWork = 2 << 20;     // multiply-adds, about 50 us on one thread: waking others takes up to 20 us
constexpr double kElementWork = 16;           // multiply-adds in the time in which one element is copied or added in memory

// For each output its sources and weights.
struct Taps {
    std::vector<Window> windows;
    std::vector<float> weights;
    int stride;

    const float* of(int i) const { return weights.data() + std::size_t(i) * stride; }
};

Taps forward_taps(const Filter& filter, int in, int full, int out) {
    const Axis axis = make_axis(filter, in, full);
    Taps taps{std::vector<Window>(out), std::vector<float>(std::size_t(out) * axis.taps), axis.taps};
    for (int i = 0; i < out; ++i) taps.windows[i] = make_window(axis, i, taps.weights.data() + std::size_t(i) * axis.taps);
    return taps;
}

// Windows move forward, so the outputs that read one source are neighbours too: the transpose is again a table of windows.
Taps transposed(const Taps& forward, int in) {
    Taps taps{std::vector<Window>(in, Window{0, 0}), {}, 0};
    const int out = int(forward.windows.size());
    for (int i = 0; i < out; ++i) {
        const Window reads = forward.windows[i];
        for (int s = reads.first; s < reads.first + reads.count; ++s) {
            Window& window = taps.windows[s];
            if (window.count == 0) window.first = i;
            window.count = i - window.first + 1;
            taps.stride = std::max(taps.stride, window.count);
        }
    }
    taps.weights.assign(std::size_t(in) * taps.stride, 0.0f);
    for (int i = 0; i < out; ++i) {
        const Window reads = forward.windows[i];
        for (int j = 0; j < reads.count; ++j) {
            const int s = reads.first + j;
            taps.weights[std::size_t(s) * taps.stride + i - taps.windows[s].first] = forward.of(i)[j];
        }
    }
    return taps;
}

template <bool kFma>
ALWAYS_INLINE float multiply_add(float a, float b, float c) {
#if defined(__GNUC__)
    if (kFma) return __builtin_fmaf(a, b, c);
#endif
    return a * b + c;
}

// out = (or +=) the sum of K weighted sources, in this order. N: channels when the compiler may know them, else 0.
template <bool kFma, int K, int N>
ALWAYS_INLINE void add_sources(
    float* __restrict out, const float* __restrict source, std::int64_t stride, const float* weights, bool fresh,
    std::int64_t channels
) {
    const std::int64_t n = N ? N : channels;
    float w[K];
    for (int k = 0; k < K; ++k) w[k] = weights[k];
    if (fresh) {
        for (std::int64_t c = 0; c < n; ++c) {
            float sum = w[0] * source[c];
            for (int k = 1; k < K; ++k) sum = multiply_add<kFma>(w[k], source[k * stride + c], sum);
            out[c] = sum;
        }
    } else {
        for (std::int64_t c = 0; c < n; ++c) {
            float sum = out[c];
            for (int k = 0; k < K; ++k) sum = multiply_add<kFma>(w[k], source[k * stride + c], sum);
            out[c] = sum;
        }
    }
}

// In the rounding of F.interpolate with antialias (PyTorch 2.11 to 2.15 for AVX2 and AVX-512): its compiler multiplies the sources
// after the first four at a time and adds the products in order; up to three are left for fused multiply-adds.
template <bool kFma, int N>
ALWAYS_INLINE void weighted_sum_of(
    float* out, const float* source, std::int64_t stride, const float* weights, int count, bool fresh, std::int64_t n
) {
    int apart = count > 4 ? 1 + (count - 1) / 4 * 4 : 0;
    while (count > 0) {
        const int step = apart == 0 ? std::min(count, 4) : (apart >= 8 ? 8 : 4) + apart % 4;
        switch (apart == 0 ? -step : step) {
            case 9: add_sources<false, 9, N>(out, source, stride, weights, fresh, n); break;
            case 8: add_sources<false, 8, N>(out, source, stride, weights, fresh, n); break;
            case 5: add_sources<false, 5, N>(out, source, stride, weights, fresh, n); break;
            case 4: add_sources<false, 4, N>(out, source, stride, weights, fresh, n); break;
            case -4: add_sources<kFma, 4, N>(out, source, stride, weights, fresh, n); break;
            case -3: add_sources<kFma, 3, N>(out, source, stride, weights, fresh, n); break;
            case -2: add_sources<kFma, 2, N>(out, source, stride, weights, fresh, n); break;
            default: add_sources<kFma, 1, N>(out, source, stride, weights, fresh, n);
        }
        apart -= apart == 0 ? 0 : step, count -= step, weights += step, source += step * stride, fresh = false;
    }
}

template <bool kFma>
ALWAYS_INLINE void weighted_sum(
    float* out, const float* source, std::int64_t stride, const float* weights, int count, bool fresh, std::int64_t n
) {
    if (fresh && count == 0) std::fill(out, out + n, 0.0f);
    // Straight-line code for the full block: 1.3 times as fast as loops.
    if (n == kBlock) weighted_sum_of<kFma, kBlock>(out, source, stride, weights, count, fresh, n);
    else weighted_sum_of<kFma, 0>(out, source, stride, weights, count, fresh, n);
}

// Rows of channels, `stride` elements apart, of which the first `present` exist and the others are zero.
template <typename T>
struct Rows {
    T* data;
    std::int64_t stride, present;
};

// What a task does: a table of weights along each axis, from in_height x in_width to out_height x out_width.
struct Pass {
    const Taps &vertical, &horizontal;
    int in_height, in_width, out_height, out_width;
    std::int64_t n;
    float *buffer, *line;  // in_height * out_width * n and max(in_width, out_width) * n floats
    bool blends = false;   // by run_blend, which needs neither: a forward of at most two taps along each axis
    std::vector<std::int64_t> addends = {};  // of the source, where each starts after it: other copies' gradients
};

// n channels every `stride` are too far apart for the hardware's prefetchers: without this, 37x37 of 768 that is not in the
// cache takes 541 us instead of 393.
template <typename T>
ALWAYS_INLINE void prefetch(Rows<const T> rows, std::int64_t first, std::int64_t count, std::int64_t n) {
#if defined(__GNUC__)
    for (std::int64_t i = first; i < std::min(first + count, rows.present); ++i) {
        const T* row = rows.data + i * rows.stride;
        for (std::int64_t c = 0; c < n; c += 64 / std::int64_t(sizeof(T))) __builtin_prefetch(row + c);
    }
#else
    (void)rows, (void)first, (void)count, (void)n;
#endif
}

// Row y of the source, along x into the buffer.
template <typename In, bool kFma>
ALWAYS_INLINE void resample_row(const Pass& pass, Rows<const In> in, int y) {
    const std::int64_t n = pass.n, first = std::int64_t{y} * pass.in_width;
    const float* source = pass.line;
    std::int64_t stride = n;
    if (sizeof(In) == 4 && first + pass.in_width <= in.present && pass.addends.empty()) {
        source = reinterpret_cast<const float*>(in.data + first * in.stride), stride = in.stride;
    } else {
        for (int x = 0; x < pass.in_width; ++x) {
            float* __restrict to = pass.line + x * n;
            const In* __restrict from = in.data + (first + x) * in.stride;
            if (first + x < in.present) {
                for (std::int64_t c = 0; c < n; ++c) to[c] = to_float(from[c]);
                for (const std::int64_t addend : pass.addends) {
                    for (std::int64_t c = 0; c < n; ++c) to[c] += to_float(from[addend + c]);
                }
            } else {
                std::fill(to, to + n, 0.0f);
            }
        }
    }
    prefetch(in, first + pass.in_width, pass.in_width, n);
    for (const std::int64_t addend : pass.addends) {
        prefetch(Rows<const In>{in.data + addend, in.stride, in.present}, first + pass.in_width, pass.in_width, n);
    }
    float* to = pass.buffer + std::int64_t{y} * pass.out_width * n;
    for (int x = 0; x < pass.out_width; ++x, to += n) {
        const Window window = pass.horizontal.windows[x];
        const float* from = source + window.first * stride;
        weighted_sum<kFma>(to, from, stride, pass.horizontal.of(x), window.count, true, n);
    }
}

// fresh: out is overwritten, else added to (float only). Rows of `out` that are not present are left alone.
template <typename In, typename Out, bool kFma>
ALWAYS_INLINE void run_pass(const Pass& pass, Rows<const In> in, Rows<Out> out, bool fresh) {
    constexpr bool kFloatOut = sizeof(Out) == 4;
    const std::int64_t n = pass.n, row = std::int64_t{pass.out_width} * n;
    int made = 0;  // rows of the buffer: each is made when the first output needs it, and read while it is in the L1 cache
    for (int y = 0; y < pass.out_height; ++y) {
        const Window window = pass.vertical.windows[y];
        for (made = std::max(made, window.first); made < window.first + window.count; ++made) {
            resample_row<In, kFma>(pass, in, made);
        }
        const float* from = pass.buffer + window.first * row;
        for (int x = 0; x < pass.out_width; ++x, from += n) {
            const std::int64_t index = std::int64_t{y} * pass.out_width + x;
            if (index >= out.present) return;
            Out* to = out.data + index * out.stride;
            float* sum = kFloatOut ? reinterpret_cast<float*>(to) : pass.line;
            weighted_sum<kFma>(sum, from, row, pass.vertical.of(y), window.count, fresh, n);
            if (!kFloatOut) {
                for (std::int64_t c = 0; c < n; ++c) to[c] = from_float<Out>(sum[c]);
            }
        }
    }
}

// The same sums in the same order, V x H sources of one output, `down` and `across` elements apart.
template <typename T, bool kFma, int V, int H>
ALWAYS_INLINE void blend(
    T* __restrict out, const T* __restrict source, std::int64_t down, std::int64_t across, const float* v, const float* h,
    std::int64_t n
) {
    for (std::int64_t c = 0; c < n; ++c) {
        float sums[V];
        for (int i = 0; i < V; ++i) {
            sums[i] = h[0] * to_float(source[i * down + c]);
            if (H == 2) sums[i] = multiply_add<kFma>(h[H - 1], to_float(source[i * down + across + c]), sums[i]);
        }
        const float sum = V == 2 ? multiply_add<kFma>(v[V - 1], sums[V - 1], v[0] * sums[0]) : v[0] * sums[0];
        out[c] = from_float<T>(sum);
    }
}

// run_pass for at most two taps along each axis, without its buffer.
template <typename T, bool kFma>
ALWAYS_INLINE void run_blend(const Pass& pass, Rows<const T> in, Rows<T> out) {
    for (int y = 0; y < pass.out_height; ++y) {
        const Window rows = pass.vertical.windows[y];
        const float* v = pass.vertical.of(y);
        for (int x = 0; x < pass.out_width; ++x) {
            const std::int64_t index = std::int64_t{y} * pass.out_width + x;
            if (index >= out.present) return;
            const Window columns = pass.horizontal.windows[x];
            const float* h = pass.horizontal.of(x);
            const std::int64_t down = pass.in_width * in.stride, across = in.stride;
            const T* source = in.data + rows.first * down + columns.first * across;
            T* to = out.data + index * out.stride;
            if (rows.count == 2 && columns.count == 2) blend<T, kFma, 2, 2>(to, source, down, across, v, h, pass.n);
            else if (rows.count == 2) blend<T, kFma, 2, 1>(to, source, down, across, v, h, pass.n);
            else if (columns.count == 2) blend<T, kFma, 1, 2>(to, source, down, across, v, h, pass.n);
            else blend<T, kFma, 1, 1>(to, source, down, across, v, h, pass.n);
        }
    }
}

template <typename In, typename Out, bool kFma>
ALWAYS_INLINE void run(const Pass& pass, Rows<const In> in, Rows<Out> out, bool fresh) {
    if constexpr (std::is_same_v<In, Out>) {
        if (pass.blends) return run_blend<In, kFma>(pass, in, out);
    }
    run_pass<In, Out, kFma>(pass, in, out, fresh);
}

template <typename In, typename Out>
using PassFunction = void (*)(const Pass&, Rows<const In>, Rows<Out>, bool);

template <typename In, typename Out>
void portable(const Pass& pass, Rows<const In> in, Rows<Out> out, bool fresh) {
    run<In, Out, false>(pass, in, out, fresh);
}
#ifdef VITKERNELS_X86
template <typename In, typename Out>
__attribute__((target("avx2,fma"))) void avx2(const Pass& pass, Rows<const In> in, Rows<Out> out, bool fresh) {
    run<In, Out, true>(pass, in, out, fresh);
}
template <typename In, typename Out>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512"))) void avx512(
    const Pass& pass, Rows<const In> in, Rows<Out> out, bool fresh
) {
    run<In, Out, true>(pass, in, out, fresh);
}
#endif

template <typename In, typename Out>
PassFunction<In, Out> pick([[maybe_unused]] int vector_bits) {
#ifdef VITKERNELS_X86
    const bool has_avx512 =
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (vector_bits >= 512 && has_avx512) return avx512<In, Out>;
    if (vector_bits >= 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2<In, Out>;
#endif
    return portable<In, Out>;
}

// The threads of the OpenMP runtime that PyTorch has loaded, if any: between two operators they spin, so they start at once,
// and any others would have to compete with them for the cores. Nothing of OpenMP is linked; GNU's, LLVM's and Intel's have
// this entry. As for PyTorch's own operators, a forked child whose parent has used them must stay with one thread.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

Parallel openmp() {
#if defined(__unix__) || defined(__APPLE__)
    static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

// Calls work() on up to `threads` threads, this one included.
template <typename Work>
void on_threads(int threads, Work& work) {
    if (threads == 1) return work();
    if (const Parallel parallel = openmp()) {
        return parallel([](void* data) { (*static_cast<Work*>(data))(); }, &work, unsigned(threads), 0);
    }
    std::vector<std::thread> helpers;
    try {
        while (int(helpers.size()) < threads - 1) helpers.emplace_back([&] { work(); });
    } catch (const std::system_error&) {
        // No more threads to be had: those that run do the work.
    }
    work();
    for (std::thread& helper : helpers) helper.join();
}

// Runs task(0) .. task(count - 1). Each thread makes its own worker first.
template <typename MakeWorker>
void run_tasks(std::int64_t count, int threads, MakeWorker make_worker) {
    std::atomic<std::int64_t> next{0};
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error;
    auto work = [&]() noexcept {
        try {
            std::int64_t i = next++;
            if (i >= count) return;  // a thread that finds nothing to do needs no memory
            for (auto task = make_worker(); i < count; i = next++) task(i);
        } catch (...) {
            if (!failed.test_and_set()) error = std::current_exception();
            next = count;
        }
    };
    on_threads(threads, work);
    if (error) std::rethrow_exception(error);
}

struct Size {
    std::size_t buffer = 0, line = 0;

    void fit(int in_height, int in_width, int out_width, std::int64_t n) {
        buffer = std::max(buffer, std::size_t(in_height) * out_width * n);
        line = std::max(line, std::size_t(std::max(in_width, out_width)) * n);
    }
};

// The tables of one target, with the multiply-adds of a channel.
struct Plan {
    Taps vertical, horizontal;
    double work = 0;

    void count_work(int in_height, int out_width) {
        for (const Window& window : horizontal.windows) work += double(in_height) * window.count;
        for (const Window& window : vertical.windows) work += double(out_width) * window.count;
    }
};

// At the start of a cache line: a vector of 64 bytes that lies across two costs two loads (1.5 times the time measured).
std::shared_ptr<float> scratch(std::size_t floats) {
    const std::align_val_t line{64};
    float* memory = static_cast<float*>(::operator new(floats * sizeof(float), line));
    return {memory, [line](float* p) { ::operator delete(p, line); }};
}

// Memory of this size often comes from the system anew (glibc: always from 32 MiB on), and then every 4 KiB costs a fault of
// 1 to 2 us: 23 of the 30 ms of 32 copies of 1.7 MB. Linux gives pages of 2 MiB to those who ask, in 0.4 us.
void ask_for_large_pages([[maybe_unused]] std::uintptr_t memory, [[maybe_unused]] std::size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr std::size_t kPage = 2 << 20, kLarge = 4 << 20;
    const std::uintptr_t begin = (memory + kPage - 1) / kPage * kPage, end = (memory + bytes) / kPage * kPage;
    if (bytes >= kLarge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// All or one: OpenMP runtimes end threads when the next region asks for fewer, and PyTorch's would start them again.
int useful_threads(double work, std::int64_t tasks, int threads) { return tasks > 1 && work >= kParallelWork ? threads : 1; }

std::int64_t blocks_of(std::int64_t channels, std::int64_t block) { return (channels + block - 1) / block; }

// The copies of each distinct target, in the order of the first. A batch of images has few sizes: timm's loop too makes each
// once, and 30 of 32 copies then cost a read and a write.
std::vector<std::vector<std::size_t>> equal_targets(const Resampling& p) {
    std::vector<std::vector<std::size_t>> groups;
    std::map<std::array<int, 4>, std::size_t> seen;
    for (std::size_t k = 0; k < p.targets.size(); ++k) {
        const Target& t = p.targets[k];
        const auto [found, is_new] = seen.try_emplace({t.height, t.width, t.full_height, t.full_width}, groups.size());
        if (is_new) groups.emplace_back();
        groups[found->second].push_back(k);
    }
    return groups;
}

template <typename T>
void forward(const Resampling& p, int threads, int vector_bits) {
    const PassFunction<T, T> pass_function = pick<T, T>(vector_bits);
    const bool blends = !p.filter.cubic && !p.filter.antialias;
    // Without a buffer to keep in the cache, long runs of channels: 1.3 times as fast as blocks of 64.
    const std::int64_t block = kBlock * (blends ? std::max<std::int64_t>(1, blocks_of(p.channels, kBlock) / threads) : 1);
    const std::int64_t blocks = blocks_of(p.channels, block), width = std::min(block, p.channels);
    const std::vector<std::int64_t> starts = first_rows(p);
    const std::vector<std::vector<std::size_t>> groups = equal_targets(p);
    std::vector<std::pair<std::size_t, std::size_t>> repeats;  // from, to
    std::vector<Plan> plans;
    Size size;
    double work = 0, copied = 0;
    for (const std::vector<std::size_t>& group : groups) {
        const std::size_t first = group.front();
        for (std::size_t i = 1; i < group.size(); ++i) repeats.emplace_back(first, group[i]);
        copied += double((starts[first + 1] - starts[first]) * p.channels) * double(group.size() - 1);
        const Target& t = p.targets[first];
        plans.push_back({forward_taps(p.filter, p.height, t.full_height, t.height),
                         forward_taps(p.filter, p.width, t.full_width, t.width)});
        plans.back().count_work(p.height, t.width);
        work += plans.back().work * double(p.channels);
        if (!blends) size.fit(p.height, p.width, t.width, width);
    }
    ask_for_large_pages(p.copies, std::size_t(starts.back() * p.channels) * sizeof(T));
    const std::int64_t tasks = blocks * std::int64_t(groups.size());
    run_tasks(tasks, useful_threads(work, tasks, threads), [&] {
        const std::shared_ptr<float> memory = scratch(size.buffer + size.line);
        return [&, memory](std::int64_t task) {
            const Plan& plan = plans[std::size_t(task / blocks)];
            const std::size_t k = groups[std::size_t(task / blocks)].front();
            const std::int64_t channel = task % blocks * block, n = std::min(block, p.channels - channel);
            const Target& t = p.targets[k];
            const T* table = reinterpret_cast<const T*>(p.table) + channel;
            T* copy = reinterpret_cast<T*>(p.copies) + starts[k] * p.channels + channel;
            for (int row = 0; row < p.prefix; ++row) {
                std::copy_n(table + row * p.channels, n, copy + row * p.channels);
            }
            const std::int64_t grid = p.prefix * p.channels, room = starts[k + 1] - starts[k] - p.prefix;
            const std::int64_t present = std::min(room, std::int64_t{t.height} * t.width);
            for (std::int64_t row = present; row < room; ++row) {
                std::fill_n(copy + grid + row * p.channels, n, T{});
            }
            if (t.height == p.height && t.width == p.width && t.full_height == p.height && t.full_width == p.width) {
                for (std::int64_t row = 0; row < present; ++row) {
                    std::copy_n(table + grid + row * p.channels, n, copy + grid + row * p.channels);
                }
                return;
            }
            const Pass pass{plan.vertical, plan.horizontal, p.height, p.width, t.height, t.width,
                            n, memory.get(), memory.get() + size.buffer, blends};
            const std::int64_t all = std::int64_t{p.height} * p.width;
            pass_function(pass, {table + grid, p.channels, all}, {copy + grid, p.channels, present}, true);
        };
    });
    const std::int64_t again = std::int64_t(repeats.size());
    run_tasks(again, useful_threads(copied * kElementWork, again, threads), [&] {
        return [&](std::int64_t task) {
            const auto [from, to] = repeats[std::size_t(task)];
            T* copies = reinterpret_cast<T*>(p.copies);
            std::copy_n(copies + starts[from] * p.channels, (starts[from + 1] - starts[from]) * p.channels,
                        copies + starts[to] * p.channels);
        };
    });
}

// Gradients of prefix rows, summed over the copies; in double for double, so that one copy's come through untouched.
template <typename T>
void prefix_gradients(const Resampling& p, const std::vector<std::int64_t>& starts, std::int64_t channel, std::int64_t n) {
    const T* copies = reinterpret_cast<const T*>(p.copies) + channel;
    T* table = reinterpret_cast<T*>(p.table) + channel;
    for (std::int64_t row = 0; row < p.prefix; ++row) {
        for (std::int64_t c = 0; c < n; ++c) {
            std::conditional_t<sizeof(T) == 8, double, float> sum = 0;
            for (std::size_t k = 0; k < p.targets.size(); ++k) {
                const T value = copies[(starts[k] + row) * p.channels + c];
                if constexpr (sizeof(T) == 8) sum += value;
                else sum += to_float(value);
            }
            if constexpr (sizeof(T) == 8) table[row * p.channels + c] = sum;
            else table[row * p.channels + c] = from_float<T>(sum);
        }
    }
}

// Each channel block sums over the copies of one target in their order, and over the targets in the order of their first
// copies, so the result does not depend on the threads.
template <typename T>
void backward(const Resampling& p, int threads, int vector_bits) {
    const PassFunction<T, float> pass_function = pick<T, float>(vector_bits);
    const std::int64_t blocks = blocks_of(p.channels, kBlock), width = std::min(kBlock, p.channels);
    const std::vector<std::int64_t> starts = first_rows(p);
    const std::vector<std::vector<std::size_t>> groups = equal_targets(p);
    std::vector<Plan> plans;
    Size size;
    double work = 0;
    for (const std::vector<std::size_t>& group : groups) {
        const Target& t = p.targets[group.front()];
        plans.push_back({transposed(forward_taps(p.filter, p.height, t.full_height, t.height), p.height),
                         transposed(forward_taps(p.filter, p.width, t.full_width, t.width), p.width)});
        plans.back().count_work(t.height, p.width);
        const double summed = double(group.size() - 1) * t.height * t.width;
        work += (plans.back().work + summed * kElementWork) * double(p.channels);
        size.fit(t.height, t.width, p.width, width);
    }
    constexpr bool kDirect = sizeof(T) == 4;  // float gradients are summed where they belong
    const std::int64_t all = std::int64_t{p.height} * p.width;
    const std::size_t sums = kDirect ? 0 : std::size_t(all * width);
    run_tasks(blocks, useful_threads(work, blocks, threads), [&] {
        const std::shared_ptr<float> memory = scratch(size.buffer + size.line + sums);
        return [&, memory](std::int64_t task) {
            const std::int64_t channel = task * kBlock, n = std::min(kBlock, p.channels - channel);
            prefix_gradients<T>(p, starts, channel, n);
            const std::int64_t grid = p.prefix * p.channels;
            T* table = reinterpret_cast<T*>(p.table) + grid + channel;
            Rows<float> sum{memory.get() + size.buffer + size.line, n, all};
            if constexpr (kDirect) sum = {table, p.channels, all};
            for (std::size_t g = 0; g < groups.size(); ++g) {
                const std::size_t k = groups[g].front();
                const Target& t = p.targets[k];
                const T* copy = reinterpret_cast<const T*>(p.copies) + starts[k] * p.channels + channel;
                const std::int64_t room = starts[k + 1] - starts[k] - p.prefix;
                Pass pass{plans[g].vertical, plans[g].horizontal, t.height, t.width, p.height, p.width,
                          n, memory.get(), memory.get() + size.buffer};
                for (std::size_t i = 1; i < groups[g].size(); ++i) {
                    pass.addends.push_back((starts[groups[g][i]] - starts[k]) * p.channels);
                }
                pass_function(pass, {copy + grid, p.channels, std::min(room, std::int64_t{t.height} * t.width)}, sum, g == 0);
            }
            if constexpr (!kDirect) {
                for (std::int64_t row = 0; row < all; ++row) {
                    const float* from = sum.data + row * n;
                    for (std::int64_t c = 0; c < n; ++c) table[row * p.channels + c] = from_float<T>(from[c]);
                }
            }
        };
    });
}

}  // namespace

void resample_forward_cpu(const Resampling& problem, int threads, int vector_bits) {
    switch (problem.dtype) {
        case Dtype::float32: return forward<float>(problem, threads, vector_bits);
        case Dtype::float16: return forward<float16>(problem, threads, vector_bits);
        case Dtype::bfloat16: return forward<bfloat16>(problem, threads, vector_bits);
        case Dtype::float64: return forward<double>(problem, threads, vector_bits);
    }
}

void resample_backward_cpu(const Resampling& problem, int threads, int vector_bits) {
    switch (problem.dtype) {
        case Dtype::float32: return backward<float>(problem, threads, vector_bits);
        case Dtype::float16: return backward<float16>(problem, threads, vector_bits);
        case Dtype::bfloat16: return backward<bfloat16>(problem, threads, vector_bits);
        case Dtype::float64: return backward<double>(problem, threads, vector_bits);
    }
}

}  // namespace vitkernels
