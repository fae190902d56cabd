// Runs one resampling: its numbers on stdin, the result on stdout. Linked with pos_embed_cuda.cu under the emulator, or with
// -DON_CPU with pos_embed_cpu.cpp. Memory has its exact size and starts as NaN, for the sanitizers and the tests.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "pos_embed.h"

using namespace vitkernels;

static std::int64_t next() {
    std::int64_t value;
    if (std::fread(&value, sizeof value, 1, stdin) != 1) throw std::runtime_error("stdin ended early");
    return value;
}

int main() {
    const bool forward = next() != 0;
    Resampling p{};
    p.dtype = Dtype(next()), p.height = int(next()), p.width = int(next()), p.channels = next(), p.prefix = int(next());
    p.rows = next();
    p.filter.cubic = next() != 0, p.filter.antialias = next() != 0, p.filter.align_corners = next() != 0;
    std::int64_t copy_rows = 0;
    for (std::int64_t left = next(); left > 0; --left) {
        Target t{};
        t.height = int(next()), t.width = int(next()), t.full_height = int(next()), t.full_width = int(next());
        copy_rows += p.rows ? p.rows : p.prefix + std::int64_t{t.height} * t.width;
        p.targets.push_back(t);
    }
    const std::size_t element = p.dtype == Dtype::float64 ? 8 : p.dtype == Dtype::float32 ? 4 : 2;
    const std::size_t table_bytes = std::size_t(p.prefix + p.height * p.width) * p.channels * element;
    const std::size_t copy_bytes = std::size_t(copy_rows) * p.channels * element;
    const std::unique_ptr<char[]> table(new char[table_bytes]), copies(new char[copy_bytes]);
    char* const in = forward ? table.get() : copies.get();
    char* const out = forward ? copies.get() : table.get();
    const std::size_t in_bytes = forward ? table_bytes : copy_bytes, out_bytes = forward ? copy_bytes : table_bytes;
    if (std::fread(in, 1, in_bytes, stdin) != in_bytes) throw std::runtime_error("stdin ended early");
    std::memset(out, 0xff, out_bytes);
    p.table = reinterpret_cast<std::uintptr_t>(table.get()), p.copies = reinterpret_cast<std::uintptr_t>(copies.get());
#ifdef ON_CPU
    const char* bits = std::getenv("VECTOR_BITS");
    (forward ? resample_forward_cpu : resample_backward_cpu)(p, 3, bits ? std::atoi(bits) : 512);
#else
    (forward ? resample_forward_cuda : resample_backward_cuda)(p, 0, 0);
#endif
    return std::fwrite(out, 1, out_bytes, stdout) == out_bytes ? 0 : 1;
}
