// Host memory for operations whose CPU kernels need some.
#pragma once

#include <cstddef>

#include "zsseg/tensor_view.h"

namespace zsseg::bindings {

// At least `bytes` bytes, aligned to 64, that the calling thread keeps between calls; the next call
// on this thread may reuse them.
TensorView host_workspace(std::size_t bytes);

}  // namespace zsseg::bindings
