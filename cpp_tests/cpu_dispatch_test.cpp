#include "zsseg/cpu_dispatch.h"

#include <gtest/gtest.h>

#include "zsseg/error.h"

namespace zsseg {
namespace {

TEST(CpuIsa, BaselineIsAlwaysThere) {
  EXPECT_EQ(available_cpu_isas().front(), CpuIsa::baseline);
}

TEST(CpuIsa, EveryAvailableOneCanBeChosen) {
  const CpuIsa before = cpu_isa();
  for (const CpuIsa isa : available_cpu_isas()) {
    set_cpu_isa(name_of(isa));
    EXPECT_EQ(cpu_isa(), isa);
  }
  set_cpu_isa(name_of(before));
}

TEST(CpuIsa, UnknownNameIsRefusedAndChangesNothing) {
  const CpuIsa before = cpu_isa();
  EXPECT_THROW(set_cpu_isa("v9"), ArgumentError);
  EXPECT_EQ(cpu_isa(), before);
}

}  // namespace
}  // namespace zsseg
