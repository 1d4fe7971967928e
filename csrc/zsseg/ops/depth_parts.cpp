#include "zsseg/ops/depth_parts.h"

#include <string>

#include "zsseg/check.h"
#include "zsseg/ops/finite_check.h"

namespace zsseg {

void expect_workspace(const TensorView& workspace, const char* other_name,
                      const TensorView& other) {
  if (workspace.data == nullptr) {
    return;
  }
  expect_dtype("workspace", workspace, {DType::uint8});
  expect_same_device("workspace", workspace, other_name, other);
  if (reinterpret_cast<std::uintptr_t>(workspace.data) % 4 != 0) {
    fail_argument("workspace", "an address that is a multiple of 4", "another");
  }
}

void expect_finite_check(const FiniteCheck& check, const char* other_name,
                         const TensorView& other) {
  if (check.finite.data == nullptr) {
    return;
  }
  expect_dtype("finite", check.finite, {DType::uint8});
  expect_shape("finite", check.finite, {1});
  expect_same_device("finite", check.finite, other_name, other);
  if (!other.device.is_cuda()) {
    return;
  }
  if (check.workspace.data == nullptr) {
    fail_argument("workspace", "8 bytes of zeros, which finite needs on CUDA", "None");
  }
  if (check.workspace.count() < FiniteCheck::kWorkspaceBytes) {
    fail_argument("workspace", "at least 8 bytes",
                  std::to_string(check.workspace.count()) + " bytes");
  }
}

}  // namespace zsseg
