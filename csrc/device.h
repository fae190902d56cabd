#pragma once

#include <optional>
#include <utility>

namespace vitkernels {

using Versions = std::pair<std::optional<int>, std::optional<int>>;

// The CUDA runtime linked into this module, and the newest that the installed driver supports.
Versions cuda_versions();

}  // namespace vitkernels
