#include <cuda_runtime_api.h>

#include "device.h"

vitkernels::Versions vitkernels::cuda_versions() {
    int runtime = 0, driver = 0;
    Versions versions;
    if (cudaRuntimeGetVersion(&runtime) == cudaSuccess) versions.first = runtime;
    // Zero, and no error, is how the runtime says that no driver is installed.
    if (cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0) versions.second = driver;
    return versions;
}
