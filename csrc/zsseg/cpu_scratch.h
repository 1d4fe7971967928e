// Memory that CPU kernels need for the time of a call.
#pragma once

#include <cstddef>

namespace zsseg {

// At least `count` floats at a multiple of 64 bytes, which the calling thread keeps between calls
// and frees when it ends; the next call on this thread may reuse them. Throws std::bad_alloc.
float* cpu_scratch(std::size_t count);

}  // namespace zsseg
