#include "zsseg/cpu_dispatch.h"

#include <atomic>
#include <cstdlib>

#include "zsseg/error.h"

namespace zsseg {
namespace {

constexpr int kUndecided = -1;
std::atomic<int> chosen_isa{kUndecided};

[[maybe_unused]] bool cpu_runs(CpuIsa isa) {
#if defined(__x86_64__)
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return isa == CpuIsa::baseline || (isa == CpuIsa::v3 && v3) || (isa == CpuIsa::v4 && v3 && v4);
#else
  return isa == CpuIsa::baseline;
#endif
}

CpuIsa parse_isa(const std::string& name) {
  std::string names;
  for (const CpuIsa isa : available_cpu_isas()) {
    if (name == name_of(isa)) {
      return isa;
    }
    names += (names.empty() ? "" : ", ") + std::string(name_of(isa));
  }
  throw ArgumentError("ZSSEG_CPU_ISA: expected one of " + names + " on this CPU, got '" + name +
                      "'. Unset it to use the best.");
}

}  // namespace

const char* name_of(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::v3:
      return "v3";
    case CpuIsa::v4:
      return "v4";
    case CpuIsa::baseline:
      break;
  }
  return "baseline";
}

std::vector<CpuIsa> available_cpu_isas() {
  std::vector<CpuIsa> isas{CpuIsa::baseline};
  ZSSEG_FOR_ISA_V3(if (cpu_runs(CpuIsa::v3)) { isas.push_back(CpuIsa::v3); })
  ZSSEG_FOR_ISA_V4(if (cpu_runs(CpuIsa::v4)) { isas.push_back(CpuIsa::v4); })
  return isas;
}

CpuIsa cpu_isa() {
  int isa = chosen_isa.load(std::memory_order_relaxed);
  if (isa == kUndecided) {
    const char* wanted = std::getenv("ZSSEG_CPU_ISA");
    const bool automatic = wanted == nullptr || *wanted == '\0';
    isa = static_cast<int>(automatic ? available_cpu_isas().back() : parse_isa(wanted));
    chosen_isa.store(isa, std::memory_order_relaxed);
  }
  return static_cast<CpuIsa>(isa);
}

void set_cpu_isa(const std::string& name) {
  chosen_isa.store(static_cast<int>(parse_isa(name)));
}

}  // namespace zsseg
