// Runs CUDA C++ kernels on a CPU: g++ compiles the .cu file itself, one fiber per CUDA thread, block after block.
//
// A fiber runs until a barrier, so between two barriers the threads of a block run one after the other, in the order of
// EMULATOR_ORDER: 0 forward, 1 reverse, any other number the seed of a shuffle at each barrier. A missing __syncthreads() shows,
// since some order lets a thread read what another has not written yet: shared memory starts as NaN. Dynamic shared memory is
// allocated in its exact size, so that -fsanitize=address sees a step over its end. Threads that leave while others wait at a
// barrier end the program. Shuffles, static shared memory, atomics and streams are not there: a kernel with them does not compile.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define VITKERNELS_LAUNCH(kernel, grid, block, shared, stream, ...) \
    (static_cast<void>(stream), emulator::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); }))
#define VITKERNELS_SHARED_MEMORY(name) float* const name = reinterpret_cast<float*>(emulator::machine().shared)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

constexpr std::size_t kStack = 64 << 10;
enum class State { ready, waiting, done };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    dim3 index;
    State state;
    void* fake_stack = nullptr;  // the address sanitizer's
};

struct Machine {
    ucontext_t scheduler;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    std::size_t scheduler_stack_size = 0;
    std::vector<Fiber> fibers;
    Fiber* current = nullptr;
    dim3 block_index, block_size, grid_size;
    void* shared = nullptr;
    std::function<void()> body;
};

inline Machine& machine() {
    static Machine instance;
    return instance;
}

// The sanitizer has to be told of each change of stack.
inline void leaving([[maybe_unused]] void** own, [[maybe_unused]] const void* stack, [[maybe_unused]] std::size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(own, stack, size);
#endif
}
inline void arrived([[maybe_unused]] void* own, [[maybe_unused]] const void** from, [[maybe_unused]] std::size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own, from, size);
#endif
}

inline void to_scheduler(State state) {
    Machine& m = machine();
    Fiber* self = m.current;
    self->state = state;
    leaving(state == State::done ? nullptr : &self->fake_stack, m.scheduler_stack, m.scheduler_stack_size);
    swapcontext(&self->context, &m.scheduler);
    arrived(self->fake_stack, nullptr, nullptr);
}

inline void resume(Fiber& fiber) {
    Machine& m = machine();
    m.current = &fiber;
    leaving(&m.scheduler_fake_stack, fiber.stack.get(), kStack);
    swapcontext(&m.scheduler, &fiber.context);
    arrived(m.scheduler_fake_stack, nullptr, nullptr);
}

inline void start() {
    Machine& m = machine();
    arrived(nullptr, &m.scheduler_stack, &m.scheduler_stack_size);
    m.body();
    to_scheduler(State::done);
}

inline void run_block(std::mt19937& random, unsigned order) {
    Machine& m = machine();
    const unsigned count = m.block_size.x * m.block_size.y * m.block_size.z;
    m.fibers.resize(count);
    for (unsigned i = 0; i < count; ++i) {
        Fiber& fiber = m.fibers[i];
        fiber.index = dim3(i % m.block_size.x, i / m.block_size.x % m.block_size.y, i / m.block_size.x / m.block_size.y);
        fiber.state = State::ready, fiber.fake_stack = nullptr;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, start, 0);
    }
    std::vector<unsigned> turns(count);
    std::iota(turns.begin(), turns.end(), 0u);
    if (order == 1) std::reverse(turns.begin(), turns.end());
    for (;;) {
        if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
        for (unsigned i : turns) resume(m.fibers[i]);
        const auto done = std::count_if(m.fibers.begin(), m.fibers.end(), [](auto& f) { return f.state == State::done; });
        if (done == count) return;
        if (done != 0) {
            std::fprintf(stderr, "emulator: %d of %u threads left while the others wait at a barrier\n", int(done), count);
            std::abort();
        }
    }
}

template <typename Body>
void launch(dim3 grid, dim3 block, std::size_t shared, Body body) {
    Machine& m = machine();
    m.grid_size = grid, m.block_size = block, m.body = body;
    const char* setting = std::getenv("EMULATOR_ORDER");
    const unsigned order = setting ? unsigned(std::atoi(setting)) : 0;
    std::mt19937 random(order);
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                const std::unique_ptr<char[]> memory(new char[shared]);
                std::memset(memory.get(), 0xff, shared);  // NaN, and -1 for integers
                m.shared = memory.get(), m.block_index = dim3(x, y, z);
                run_block(random, order);
            }
        }
    }
}

}  // namespace emulator

#define threadIdx (emulator::machine().current->index)
#define blockIdx (emulator::machine().block_index)
#define blockDim (emulator::machine().block_size)
#define gridDim (emulator::machine().grid_size)
inline void __syncthreads() { emulator::to_scheduler(emulator::State::waiting); }

// The runtime, as far as the launchers call it.
using cudaStream_t = struct EmulatedStream*;
enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
    return cudaSuccess;
}
