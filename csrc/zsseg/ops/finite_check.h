// Whether a result is finite, told by the kernel that makes it.
#pragma once

#include <cstdint>

#include "zsseg/tensor_view.h"

namespace zsseg {

// The answer of a call beyond its result. An absent array is a default-constructed view.
struct FiniteCheck {
  TensorView finite;     // uint8 [1]: 1 if the result holds neither NaN nor infinity, else 0
  TensorView workspace;  // needed with `finite` on CUDA: uint8, at least so many bytes, at a
                         // multiple of 4, zeros before the first call; every call leaves zeros in
                         // the first DepthWorkspace::kHeadBytes. With DepthWorkspace::kBytes,
                         // blocks share the depth where a GPU would else idle
  static constexpr std::int64_t kWorkspaceBytes = 8;
};

// Checks both where `finite` is present; `other` is an argument of the call, which has a name.
void expect_finite_check(const FiniteCheck& check, const char* other_name, const TensorView& other);

}  // namespace zsseg
