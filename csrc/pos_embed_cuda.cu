// The CUDA kernels. A block makes one row of one grid for a chunk of channels in two passes: columns first, into shared memory
// (eq. 3, rows and columns exchanged), then along the row. Columns first, because the intermediate is then one row of the source,
// which fits into shared memory up to 512 positions, so that no size needs a second launch. Where the row's outputs read fewer
// columns than there are (w' taps < w: smaller grids without antialias), one pass: each output sums its own columns, same bits.
//
// 14x14 -> 24x24 of 768 in float32: 144 blocks; 56 source positions of 16 bytes a lane, all but the first in L2; 4.1 MB through
// L2 and 1.8 MB written, about 1 us at 4 TB/s, so the launch is the floor. Weights: 5 of each column, by the block's threads.
//
// Each row of a copy has one writer, and a gradient is a gather: no atomics, and the same bits from run to run.
#ifdef VITKERNELS_EMULATOR
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>
#define VITKERNELS_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define VITKERNELS_SHARED_MEMORY(name) extern __shared__ __align__(16) float name[]
#endif

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dtypes.cuh"
#include "pos_embed.h"

namespace vitkernels {
namespace {

constexpr int kMaxTargets = 448, kMaxSide = 512, kThreads = 256;
constexpr std::size_t kShared = 48 << 10, kMaxShared = 96 << 10;  // sm_86, 89 and 120 have 99 KiB for a block

struct Size {
    std::uint16_t height, width, full_height, full_width;
};

// Kernel arguments: under the 4 KiB that every driver takes, and no copy that a stream would have to wait for.
template <typename T>
struct Arguments {
    T *table, *copies;
    std::int64_t channels, rows;
    int height, width, prefix, count;
    Filter filter;
    Size sizes[kMaxTargets];
};
static_assert(sizeof(Arguments<double>) <= 4096, "kernel arguments");

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
    T values[V];
};

template <int V, typename T>
__device__ void load(const T* from, float (&to)[V]) {
    const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
    for (int v = 0; v < V; ++v) to[v] = to_float(pack.values[v]);
}
template <int V, typename T>
__device__ void store(T* to, const float (&from)[V]) {
    Pack<T, V> pack;
    for (int v = 0; v < V; ++v) pack.values[v] = from_float<T>(from[v]);
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
}
// V floats of shared memory. All in 16-byte accesses when V is a multiple of 4.
template <int V>
__device__ void add_weighted(const float* from, float weight, float (&sum)[V]) {
    constexpr int kStep = V < 4 ? V : 4;
    for (int v = 0; v < V; v += kStep) {
        const Pack<float, kStep> pack = *reinterpret_cast<const Pack<float, kStep>*>(from + v);
        for (int i = 0; i < kStep; ++i) sum[v + i] = fmaf(weight, pack.values[i], sum[v + i]);
    }
}
template <int V>
__device__ void put(float* to, const float (&from)[V]) {
    constexpr int kStep = V < 4 ? V : 4;
    for (int v = 0; v < V; v += kStep) {
        Pack<float, kStep> pack;
        for (int i = 0; i < kStep; ++i) pack.values[i] = from[v + i];
        *reinterpret_cast<Pack<float, kStep>*>(to + v) = pack;
    }
}

__device__ std::int64_t copy_rows(std::int64_t rows, int prefix, Size size) {
    return rows ? rows : prefix + std::int64_t{size.height} * size.width;
}

// The parts of shared memory, in floats. Rows of channels first: they need the alignment.
struct Layout {
    int lines, weights, windows, column, total;

    __host__ __device__ Layout(int lines_of_channels, int chunk, int weight_count, int window_count, int column_count) {
        lines = 0;
        weights = lines + lines_of_channels * chunk;
        windows = weights + weight_count;
        column = windows + 2 * window_count;
        total = column + column_count;
    }
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2) resample_forward_kernel(const Arguments<T> a) {
    VITKERNELS_SHARED_MEMORY(shared);
    const int lanes = blockDim.x, groups = blockDim.y, lane = threadIdx.x, group = threadIdx.y;
    const int thread = group * lanes + lane, threads = lanes * groups, chunk = lanes * V;
    // Blocks: of each copy its rows, then one for its prefix and padding.
    int k = 0, y = blockIdx.x;
    std::int64_t start = 0;
    while (y > a.sizes[k].height) {
        y -= a.sizes[k].height + 1;
        start += copy_rows(a.rows, a.prefix, a.sizes[k++]);
    }
    const Size size = a.sizes[k];
    const std::int64_t channel = std::int64_t{blockIdx.y} * chunk + lane * V, room = copy_rows(a.rows, a.prefix, size);
    const bool mine = channel < a.channels;
    const T* table = a.table + channel;
    T* copy = a.copies + start * a.channels + channel;
    const std::int64_t grid = a.prefix, all = std::int64_t{size.height} * size.width;

    if (y == size.height) {  // exact copies, whatever the dtype
        if (!mine) return;
        for (std::int64_t row = group; row < grid; row += groups) {
            *reinterpret_cast<Pack<T, V>*>(copy + row * a.channels) =
                *reinterpret_cast<const Pack<T, V>*>(table + row * a.channels);
        }
        for (std::int64_t row = grid + all + group; row < room; row += groups) {
            *reinterpret_cast<Pack<T, V>*>(copy + row * a.channels) = Pack<T, V>{};
        }
        return;
    }
    if (size.height == a.height && size.width == a.width && size.full_height == a.height && size.full_width == a.width) {
        for (int x = group; mine && x < size.width; x += groups) {
            const std::int64_t row = grid + std::int64_t{y} * size.width + x;
            if (row >= room) break;
            *reinterpret_cast<Pack<T, V>*>(copy + row * a.channels) =
                *reinterpret_cast<const Pack<T, V>*>(table + row * a.channels);
        }
        return;
    }

    const Axis vertical = make_axis(a.filter, a.height, size.full_height);
    const Axis horizontal = make_axis(a.filter, a.width, size.full_width);
    const Layout layout(a.width, chunk, size.width * horizontal.taps, size.width, vertical.taps + 2);
    float *line = shared + layout.lines, *weights = shared + layout.weights, *column = shared + layout.column;
    Window* windows = reinterpret_cast<Window*>(shared + layout.windows);
    Window* column_window = reinterpret_cast<Window*>(column + vertical.taps);
    for (int x = thread; x < size.width; x += threads) windows[x] = make_window(horizontal, x, weights + x * horizontal.taps);
    if (thread == threads - 1) *column_window = make_window(vertical, y, column);
    __syncthreads();

    const Window rows = *column_window;
    const auto column_sum = [&](int x, float(&sum)[V]) {
        for (int v = 0; v < V; ++v) sum[v] = 0.0f;
        for (int i = 0; i < rows.count; ++i) {
            float value[V];
            load<V>(table + (grid + std::int64_t{rows.first + i} * a.width + x) * a.channels, value);
            for (int v = 0; v < V; ++v) sum[v] = fmaf(column[i], value[v], sum[v]);
        }
    };
    const bool one_pass = size.width * horizontal.taps < a.width;
    if (!one_pass) {
        for (int x = group; mine && x < a.width; x += groups) {
            float sum[V];
            column_sum(x, sum);
            put<V>(line + x * chunk + lane * V, sum);
        }
        __syncthreads();
    }

    for (int x = group; mine && x < size.width; x += groups) {
        const std::int64_t row = grid + std::int64_t{y} * size.width + x;
        if (row >= room) break;
        const Window reads = windows[x];
        float sum[V] = {};
        for (int j = 0; j < reads.count; ++j) {
            const float weight = weights[x * horizontal.taps + j];
            if (one_pass) {
                float part[V];
                column_sum(reads.first + j, part);
                for (int v = 0; v < V; ++v) sum[v] = fmaf(weight, part[v], sum[v]);
            } else {
                add_weighted<V>(line + (reads.first + j) * chunk + lane * V, weight, sum);
            }
        }
        store<V>(copy + row * a.channels, sum);
    }
}

// Prefix gradients, summed over the copies in their order; in double for double, so that one copy's come through untouched.
template <typename T, int V>
__device__ void prefix_gradients(const Arguments<T>& a, std::int64_t channel) {
    for (int row = threadIdx.y; row < a.prefix; row += blockDim.y) {
        for (int v = 0; v < V; ++v) {
            const std::int64_t offset = row * a.channels + channel + v;
            std::int64_t start = 0;
            if constexpr (sizeof(T) == 8) {
                double sum = 0;
                for (int k = 0; k < a.count; start += copy_rows(a.rows, a.prefix, a.sizes[k++])) {
                    sum += a.copies[start * a.channels + offset];
                }
                a.table[offset] = sum;
            } else {
                float sum = 0;
                for (int k = 0; k < a.count; start += copy_rows(a.rows, a.prefix, a.sizes[k++])) {
                    sum += to_float(a.copies[start * a.channels + offset]);
                }
                a.table[offset] = from_float<T>(sum);
            }
        }
    }
}

// The same on transposed weights: a block makes one row of the table, adding up the copies in their order in shared memory.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2) resample_backward_kernel(const Arguments<T> a) {
    VITKERNELS_SHARED_MEMORY(shared);
    const int lanes = blockDim.x, groups = blockDim.y, lane = threadIdx.x, group = threadIdx.y;
    const int thread = group * lanes + lane, threads = lanes * groups, chunk = lanes * V, y = blockIdx.x;
    const std::int64_t channel = std::int64_t{blockIdx.y} * chunk + lane * V;
    const bool mine = channel < a.channels;
    if (y == a.height) {
        if (mine) prefix_gradients<T, V>(a, channel);
        return;
    }
    float* total = shared;  // (width, chunk): each element has one thread, in all of the kernel
    for (int x = group; x < a.width; x += groups) {
        const float zero[V] = {};
        put<V>(total + x * chunk + lane * V, zero);
    }
    std::int64_t start = 0;
    for (int k = 0; k < a.count; ++k) {
        const Size size = a.sizes[k];
        const Axis vertical = make_axis(a.filter, a.height, size.full_height);
        const Axis horizontal = make_axis(a.filter, a.width, size.full_width);
        float* line = shared + a.width * chunk;
        const Layout layout(size.width, chunk, size.width * horizontal.taps, size.width + a.width, size.height);
        float *weights = line + layout.weights, *column = line + layout.column;
        Window *windows = reinterpret_cast<Window*>(line + layout.windows), *readers = windows + size.width;
        __syncthreads();  // the tables of the copy before have been read
        for (int x = thread; x < size.width; x += threads) windows[x] = make_window(horizontal, x, weights + x * horizontal.taps);
        for (int i = thread; i < size.height; i += threads) column[i] = weight_of(vertical, i, y);
        __syncthreads();

        // Windows move forward, so those that read one source are neighbours.
        for (int x = thread; x < a.width; x += threads) {
            Window found{0, 0};
            for (int j = 0; j < size.width; ++j) {
                if (x < windows[j].first || x >= windows[j].first + windows[j].count) continue;
                if (found.count == 0) found.first = j;
                found.count = j - found.first + 1;
            }
            readers[x] = found;
        }
        const std::int64_t room = copy_rows(a.rows, a.prefix, size);
        const T* copy = a.copies + start * a.channels + channel;
        for (int x = group; mine && x < size.width; x += groups) {
            float sum[V] = {};
            for (int i = 0; i < size.height; ++i) {
                const std::int64_t row = a.prefix + std::int64_t{i} * size.width + x;
                const float weight = column[i];
                if (weight == 0.0f || row >= room) continue;
                float value[V];
                load<V>(copy + row * a.channels, value);
                for (int v = 0; v < V; ++v) sum[v] = fmaf(weight, value[v], sum[v]);
            }
            put<V>(line + x * chunk + lane * V, sum);
        }
        __syncthreads();

        for (int x = group; mine && x < a.width; x += groups) {
            const Window found = readers[x];
            float sum[V] = {};
            add_weighted<V>(total + x * chunk + lane * V, 1.0f, sum);
            for (int j = found.first; j < found.first + found.count; ++j) {
                const int tap = x - windows[j].first;
                if (tap < 0 || tap >= windows[j].count) continue;
                add_weighted<V>(line + j * chunk + lane * V, weights[j * horizontal.taps + tap], sum);
            }
            put<V>(total + x * chunk + lane * V, sum);
        }
        start += room;
    }
    T* table = a.table + (a.prefix + std::int64_t{y} * a.width) * a.channels + channel;
    for (int x = group; mine && x < a.width; x += groups) {
        float sum[V] = {};
        add_weighted<V>(total + x * chunk + lane * V, 1.0f, sum);
        store<V>(table + x * a.channels, sum);
    }
}

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Floats of shared memory that the blocks of a launch need with `chunk` channels each.
std::size_t shared_floats(const Resampling& p, bool forward, int chunk) {
    int most = 0;
    for (const Target& t : p.targets) {
        const Axis vertical = make_axis(p.filter, p.height, t.full_height);
        const Axis horizontal = make_axis(p.filter, p.width, t.full_width);
        const int weights = t.width * horizontal.taps;
        const Layout layout = forward ? Layout(p.width, chunk, weights, t.width, vertical.taps + 2)
                                      : Layout(t.width, chunk, weights, t.width + p.width, t.height);
        most = std::max(most, layout.total + (forward ? 0 : p.width * chunk));
    }
    return std::size_t(most);
}

template <typename T, int V>
void launch(const Resampling& p, bool forward, cudaStream_t stream) {
    Arguments<T> a{reinterpret_cast<T*>(p.table), reinterpret_cast<T*>(p.copies), p.channels, p.rows, p.height, p.width,
                   p.prefix, int(p.targets.size()), p.filter, {}};
    unsigned blocks = forward ? 0 : unsigned(p.height) + (p.prefix > 0);
    for (int k = 0; k < a.count; ++k) {
        const Target& t = p.targets[k];
        a.sizes[k] = {std::uint16_t(t.height), std::uint16_t(t.width), std::uint16_t(t.full_height), std::uint16_t(t.full_width)};
        if (forward) blocks += unsigned(t.height) + 1;
    }
    // 32 lanes of 16 bytes, and fewer where the rows of a wide grid would not fit into shared memory.
    int lanes = 32;
    while (lanes > 1 && lanes / 2 * V >= p.channels) lanes /= 2;
    while (lanes > 1 && shared_floats(p, forward, lanes * V) * sizeof(float) > kShared) lanes /= 2;
    const std::size_t shared = shared_floats(p, forward, lanes * V) * sizeof(float);
    if (shared > kMaxShared) throw std::runtime_error("resampling: a grid is too large for shared memory");
    const auto kernel = forward ? resample_forward_kernel<T, V> : resample_backward_kernel<T, V>;
    if (shared > kShared) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "resampling");
    }
    const std::int64_t chunk = lanes * V, chunks = (p.channels + chunk - 1) / chunk;
    if (chunks > 65535) throw std::runtime_error("resampling: too many channels");
    VITKERNELS_LAUNCH(kernel, dim3(blocks, unsigned(chunks)), dim3(lanes, kThreads / lanes), shared, stream, a);
    check(cudaGetLastError(), forward ? "resampling" : "resampling backward");
}

template <typename T>
void launch(const Resampling& p, bool forward, cudaStream_t stream) {
    constexpr int kVector = 16 / sizeof(T);
    // Every row begins at a multiple of 16 bytes if the first one does and rows are such multiples.
    if (p.channels % kVector == 0 && (p.table | p.copies) % 16 == 0) return launch<T, kVector>(p, forward, stream);
    launch<T, 1>(p, forward, stream);
}

void launch(const Resampling& p, bool forward, int device, std::uintptr_t stream) {
    int side = std::max(p.height, p.width);
    for (const Target& t : p.targets) side = std::max({side, t.full_height, t.full_width});
    if (side > kMaxSide || p.targets.empty() || p.targets.size() > kMaxTargets) {
        throw std::invalid_argument("resampling: 1 to 448 grids of up to 512 a side");
    }
    check(cudaSetDevice(device), "resampling");
    const auto where = reinterpret_cast<cudaStream_t>(stream);
    switch (p.dtype) {
        case Dtype::float32: return launch<float>(p, forward, where);
        case Dtype::float16: return launch<float16>(p, forward, where);
        case Dtype::bfloat16: return launch<bfloat16>(p, forward, where);
        case Dtype::float64: return launch<double>(p, forward, where);
    }
}

}  // namespace

void resample_forward_cuda(const Resampling& problem, int device, std::uintptr_t stream) {
    launch(problem, true, device, stream);
}

void resample_backward_cuda(const Resampling& problem, int device, std::uintptr_t stream) {
    launch(problem, false, device, stream);
}

}  // namespace vitkernels
