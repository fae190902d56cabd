// The Python module vitkernels._C. Functions take raw pointers, sizes and the stream as integers: shapes, dtypes and
// devices are checked in vitkernels/ops/, and nothing here knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "device.h"
#include "pos_embed.h"

namespace py = pybind11;
using namespace py::literals;
using namespace vitkernels;

#ifndef VITKERNELS_CUDA
Versions vitkernels::cuda_versions() { return {}; }
#endif

static py::dict build_info() {
    py::dict info;
    info["compiler"] = VITKERNELS_COMPILER;
#ifdef VITKERNELS_CUDA
    info["cuda"] = VITKERNELS_CUDA;
#else
    info["cuda"] = py::none();
#endif
    info["architectures"] = py::str(VITKERNELS_ARCHITECTURES).attr("split")();
    return info;
}

// A resampling function takes the members of Resampling in their order, then where to run. For its targets: h, w of each copy,
// and whether a copy of another size than the table's is the upper left of the square of its larger side.
template <auto resample, typename... Where, typename... Names>
static void define(py::module_& m, const char* name, const char* doc, const Names&... where) {
    m.def(
        name,
        [](std::uintptr_t table, std::uintptr_t copies, int dtype, int height, int width, std::int64_t channels, int prefix,
           std::int64_t rows, bool cubic, bool antialias, bool align_corners, bool squares, const std::vector<int>& sizes,
           Where... values) {
            const py::gil_scoped_release release;
            Resampling problem{table,    copies, Dtype(dtype), height, width,
                               channels, prefix, rows,         {cubic, antialias, align_corners}, {}};
            for (std::size_t i = 0; i + 1 < sizes.size(); i += 2) {
                const int h = sizes[i], w = sizes[i + 1], side = std::max(h, w);
                const bool square = squares && (h != height || w != width);
                problem.targets.push_back({h, w, square ? side : h, square ? side : w});
            }
            resample(problem, values...);
        },
        doc, "table"_a, "copies"_a, "dtype"_a, "height"_a, "width"_a, "channels"_a, "prefix"_a, "rows"_a, "cubic"_a,
        "antialias"_a, "align_corners"_a, "squares"_a, "sizes"_a, where...);
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled part of vitkernels.";
    m.def("build_info", &build_info,
          "How this module was built: compiler, cuda (nvcc's version or None), architectures (sm_* binaries, compute_* PTX).");
    m.def("cuda_versions", &cuda_versions,
          "(runtime, driver) as CUDA numbers them, 13000 for 13.0. None: built without a runtime, or no driver here.");
    const char* doc = "Resampled copies of a position embedding, or its gradient from theirs: see csrc/pos_embed.h.";
    define<resample_forward_cpu, int, int>(m, "resample_forward_cpu", doc, "threads"_a, "vector_bits"_a = 512);
    define<resample_backward_cpu, int, int>(m, "resample_backward_cpu", doc, "threads"_a, "vector_bits"_a = 512);
#ifdef VITKERNELS_CUDA
    define<resample_forward_cuda, int, std::uintptr_t>(m, "resample_forward_cuda", doc, "device"_a, "stream"_a);
    define<resample_backward_cuda, int, std::uintptr_t>(m, "resample_backward_cuda", doc, "device"_a, "stream"_a);
#endif
}
