#include "zsseg/cpu_dispatch.h"

#include <atomic>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "zsseg/error.h"

namespace zsseg {
namespace {

constexpr int kUndecided = -1;
std::atomic<int> chosen_isa{kUndecided};

#if defined(__x86_64__)
// By the CPU's own word: __builtin_cpu_supports needs a runtime library that zig lacks.
bool cpu_has(unsigned leaf, unsigned ecx_bits, unsigned ebx_bits) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(leaf, 0, &eax, &ebx, &ecx, &edx) != 0 && (ecx & ecx_bits) == ecx_bits &&
         (ebx & ebx_bits) == ebx_bits;
}

// Whether the operating system keeps these registers when it switches threads.
bool system_keeps(unsigned registers) {
  constexpr unsigned kOsXsave = 1U << 27;
  if (!cpu_has(1, kOsXsave, 0)) {
    return false;  // the CPU does not know the next instruction either
  }
  unsigned low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & registers) == registers;
}

[[maybe_unused]] bool cpu_runs(CpuIsa isa) {
  constexpr unsigned kAvxRegisters = 0x6, kAvx512Registers = 0xe6;
  // fma, movbe, avx, f16c; lzcnt; bmi, avx2, bmi2
  constexpr unsigned kV3Leaf1 = 1U << 12 | 1U << 22 | 1U << 28 | 1U << 29;
  constexpr unsigned kV3Extended = 1U << 5, kV3Leaf7 = 1U << 3 | 1U << 5 | 1U << 8;
  // avx512f, avx512dq, avx512cd, avx512bw, avx512vl
  constexpr unsigned kV4Leaf7 = 1U << 16 | 1U << 17 | 1U << 28 | 1U << 30 | 1U << 31;
  if (isa == CpuIsa::baseline) {
    return true;
  }
  const bool v3 = system_keeps(kAvxRegisters) && cpu_has(1, kV3Leaf1, 0) &&
                  cpu_has(0x80000001U, kV3Extended, 0) && cpu_has(7, 0, kV3Leaf7);
  const bool v4 = v3 && system_keeps(kAvx512Registers) && cpu_has(7, 0, kV4Leaf7);
  return isa == CpuIsa::v3 ? v3 : v4;
}
#else
[[maybe_unused]] bool cpu_runs(CpuIsa isa) {
  return isa == CpuIsa::baseline;
}
#endif

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
