// The Python module vitkernels._C. Functions take raw pointers, sizes and the stream as integers: shapes, dtypes and
// devices are checked in vitkernels/ops/, and nothing here knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.h"

namespace py = pybind11;

#ifndef VITKERNELS_CUDA
vitkernels::Versions vitkernels::cuda_versions() { return {}; }
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

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled part of vitkernels.";
    m.def("build_info", &build_info,
          "How this module was built: compiler, cuda (nvcc's version or None), architectures (sm_* binaries, compute_* PTX).");
    m.def("cuda_versions", &vitkernels::cuda_versions,
          "(runtime, driver) as CUDA numbers them, 13000 for 13.0. None: built without a runtime, or no driver here.");
}
