#include <atomic>
#include <cstdint>

#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/all_finite.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kGrainValues = 1 << 19;  // about 50 us of reading

// No early end: the loop is one of vectors, and what it looks for is rare.
template <typename T>
bool finite_range(const T* values, std::int64_t count) {
  std::uint32_t others = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    others |= is_finite(values[i]) ? 0u : 1u;
  }
  return others == 0;
}

}  // namespace

void all_finite_cpu(const TensorView& values, const TensorView& out) {
  std::atomic<bool> finite{true};
  parallel_for(0, values.count(), kGrainValues, [&](std::int64_t begin, std::int64_t end) {
    ZSSEG_DISPATCH_ANY_FLOAT(values.dtype, T, {
      if (!finite_range(values.as<const T>() + begin, end - begin)) {
        finite.store(false, std::memory_order_relaxed);
      }
    });
  });
  *out.as<std::uint8_t>() = finite.load(std::memory_order_relaxed) ? 1 : 0;
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
