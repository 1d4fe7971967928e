#include "zsseg/ops/depth_parts.h"

#include "zsseg/check.h"

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

}  // namespace zsseg
