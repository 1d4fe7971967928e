#include "block.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "races.h"

// The linker marks where the __shared__ variables of all kernels lie; null if there are none.
extern "C" {
extern char __start_cuda_emulation_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_emulation_shared[] __attribute__((weak, visibility("hidden")));
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_emulation {
namespace {

constexpr int kPoison = 0xff;  // NaN as a float
constexpr std::size_t kLanes = 32;
constexpr std::size_t kStackBytes = 256 * 1024;

enum class State : char { ready, at_barrier, at_warp, done };

struct Wait {
  const char* file = nullptr;
  int line = 0;
  unsigned mask = 0;  // lanes that meet, for warps

  bool is_same(const Wait& other) const {
    return line == other.line && mask == other.mask &&
           (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string place() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash != nullptr ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

// What cp.async still owes; from null, zeros.
struct Copy {
  void* to;
  const void* from;
};
using CopyGroup = std::vector<Copy>;

void copy_now(const Copy& copy) {
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, 16);
  } else {
    std::memcpy(copy.to, copy.from, 16);
  }
}

// One thread of a block, on a stack of its own that serves the next block's thread too.
struct Fiber {
  jmp_buf left_at;
  bool is_started = false;
  uint3 index = {};
  Wait wait;
  std::uint64_t given = 0;        // to the other lanes of its warp
  CopyGroup open;                 // copies since the last group ended
  std::vector<CopyGroup> groups;  // that nothing waited for, the oldest first
};

struct Scheduler {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  State states[kMaxThreads];    // of the fibers, side by side to be gone through quickly
  std::size_t num_threads = 0;  // of the block
  std::uint64_t answers[kMaxThreads / kLanes][kLanes] = {};  // what each warp's lanes last gave
  char* stacks = nullptr;
  jmp_buf left_at;
  Fiber* running = nullptr;
  const std::function<void()>* thread = nullptr;
  std::exception_ptr failure;
  std::uint32_t random = 1;

  bool toss() {
    random = random * 1664525u + 1013904223u;
    return random >> 31 != 0;
  }
  char* stack_of(std::size_t index) { return stacks + index * kStackBytes; }
  std::size_t index_of(const Fiber& fiber) const {
    return static_cast<std::size_t>(&fiber - fibers.data());
  }
};

Scheduler& scheduler() {
  static auto* const only = new Scheduler;
  return *only;
}

void suspend(State state, const Wait& wait) {
  Scheduler& own = scheduler();
  Fiber& fiber = *own.running;
  own.states[own.index_of(fiber)] = state;
  fiber.wait = wait;
  if (_setjmp(fiber.left_at) == 0) {
    _longjmp(own.left_at, 1);
  }
}

// The first function on every fiber's stack. It never returns.
void run_threads() {
  Scheduler& own = scheduler();
  while (true) {
    try {
      (*own.thread)();
    } catch (...) {
      own.failure = std::current_exception();
    }
    suspend(State::done, {});
  }
}

// Switches contexts by a call once, which costs system calls, and by jumps from then on.
void start_fiber(char* stack) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_threads, 0);
  setcontext(&context);
}

void resume(Scheduler& own, std::size_t index) {
  Fiber& fiber = own.fibers[index];
  own.running = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(own.left_at) == 0) {
    if (fiber.is_started) {
      _longjmp(fiber.left_at, 1);
    }
    fiber.is_started = true;
    start_fiber(own.stack_of(index));
  }
}

// Lets the lanes that `wait` names go on, if all have come; `first` is the warp's first thread.
void meet(Scheduler& own, std::size_t first, const Wait& wait) {
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    if ((wait.mask >> lane & 1u) == 0) {
      continue;
    }
    const std::size_t index = first + lane;
    if (index >= own.num_threads || own.states[index] == State::done) {
      throw KernelFault(wait.place() + " waits for lane " + std::to_string(lane) +
                        " of its warp, which has ended or never was");
    }
    if (own.states[index] != State::at_warp || !own.fibers[index].wait.is_same(wait)) {
      return;
    }
  }
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    if ((wait.mask >> lane & 1u) != 0) {
      own.states[first + lane] = State::ready;
      own.answers[first / kLanes][lane] = own.fibers[first + lane].given;
    }
  }
  order_warp(first / kLanes);
}

// Whether any lanes of the warp met.
bool release_warp(Scheduler& own, std::size_t first, std::size_t end) {
  bool any = false;
  for (std::size_t index = first; index < end; ++index) {
    if (own.states[index] == State::at_warp) {
      meet(own, first, own.fibers[index].wait);
      any = any || own.states[index] == State::ready;
    }
  }
  return any;
}

// Runs one warp up to where all its lanes wait for other warps.
void run_warp(Scheduler& own, std::size_t first) {
  const std::size_t end = std::min(first + kLanes, own.num_threads);
  do {
    const bool backwards = own.toss();
    for (std::size_t step = first; step < end; ++step) {
      const std::size_t index = backwards ? first + end - 1 - step : step;
      if (own.states[index] == State::ready) {
        resume(own, index);
        if (own.failure) {
          std::rethrow_exception(std::exchange(own.failure, nullptr));
        }
      }
    }
  } while (release_warp(own, first, end));
}

// Whether any thread waited.
bool release_barrier(Scheduler& own) {
  const Fiber* first = nullptr;
  for (std::size_t index = 0; index < own.num_threads; ++index) {
    const Fiber& fiber = own.fibers[index];
    if (own.states[index] == State::done) {
      continue;
    }
    if (own.states[index] == State::at_warp) {
      throw KernelFault("lanes of a warp wait for ever at " + fiber.wait.place());
    }
    if (first != nullptr && !first->wait.is_same(fiber.wait)) {
      throw KernelFault("threads of one block wait at different barriers: " + first->wait.place() +
                        " and " + fiber.wait.place());
    }
    first = first != nullptr ? first : &fiber;
    own.states[index] = State::ready;
  }
  return first != nullptr;
}

void check_races() {
  const std::string race = take_race();
  if (!race.empty()) {
    throw KernelFault(race);
  }
}

constexpr std::size_t kBeyond = 256;  // bytes past dynamic shared memory that are watched
alignas(16) char dynamic_shared[kMaxShared + kBeyond];

void poison_shared(const std::vector<SharedVariable>& variables, std::size_t dynamic_bytes) {
  for (const SharedVariable& variable : variables) {
    watch(variable.from, variable.from + variable.bytes);
    std::memset(variable.from, kPoison, variable.bytes);
  }
  std::memset(
      __start_cuda_emulation_shared, kPoison,
      static_cast<std::size_t>(__stop_cuda_emulation_shared - __start_cuda_emulation_shared));
  std::memset(dynamic_shared, kPoison, dynamic_bytes + kBeyond);
}

void check_dynamic_shared(std::size_t bytes) {
  const auto is_poison = [](char byte) { return byte == static_cast<char>(kPoison); };
  if (!std::all_of(dynamic_shared + bytes, dynamic_shared + bytes + kBeyond, is_poison)) {
    throw KernelFault("a block wrote past its " + std::to_string(bytes) +
                      " bytes of dynamic shared memory");
  }
}

// Gives `value` to the lanes of `mask` and returns what each of them gave; valid until the next
// call.
const std::uint64_t* meet_lanes(unsigned mask, std::uint64_t value, const char* file, int line) {
  Scheduler& own = scheduler();
  Fiber& fiber = *own.running;
  const Wait wait = {file, line, mask};
  if ((mask >> lane() & 1u) == 0) {
    throw KernelFault(wait.place() + ": a lane calls with a mask that leaves it out");
  }
  fiber.given = value;
  suspend(State::at_warp, wait);
  return own.answers[own.index_of(fiber) / kLanes];
}

void prepare(Scheduler& own, const dim3& block) {
  if (own.stacks == nullptr) {
    void* stacks = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) {
      throw KernelFault("no memory for the threads' stacks");
    }
    own.stacks = static_cast<char*>(stacks);
    watch(__start_cuda_emulation_shared, __stop_cuda_emulation_shared);
    watch(dynamic_shared, dynamic_shared + sizeof dynamic_shared);
  }
  own.num_threads = std::size_t{block.x} * block.y * block.z;
  for (std::size_t index = 0; index < own.num_threads; ++index) {
    const auto linear = static_cast<unsigned>(index);
    own.fibers[index].index = {linear % block.x, linear / block.x % block.y,
                               linear / block.x / block.y};
    own.states[index] = State::ready;
    own.fibers[index].open.clear();
    own.fibers[index].groups.clear();
  }
}

// One warp after the other runs as far as it can, from first to last or from last to first, by
// chance, and so do the lanes of a warp: where a barrier is missing, one of the orders shows it.
void run_to_end(Scheduler& own) {
  const std::size_t num_warps = (own.num_threads + kLanes - 1) / kLanes;
  do {
    const bool backwards = own.toss();
    for (std::size_t step = 0; step < num_warps; ++step) {
      run_warp(own, (backwards ? num_warps - 1 - step : step) * kLanes);
    }
    check_races();
    order_block();
  } while (release_barrier(own));
}

}  // namespace

std::uint64_t block_at(std::uint64_t turn, std::uint64_t count, std::uint64_t launch) {
  constexpr std::uint64_t kStep = 1000003;  // a prime: it visits every block
  if (launch % 3 == 2 && count % kStep != 0) {
    return turn % count * (kStep % count) % count;
  }
  return launch % 3 == 0 ? turn : count - 1 - turn;
}

void run_block(const BlockLaunch& launch, const uint3& block_index) {
  Scheduler& own = scheduler();
  gridDim = launch.grid;
  blockDim = launch.block;
  blockIdx = block_index;
  own.thread = &launch.thread;
  prepare(own, launch.block);
  poison_shared(launch.variables, launch.shared_bytes);
  try {
    run_to_end(own);
  } catch (const KernelFault&) {
    for (Fiber& fiber : own.fibers) {
      fiber.is_started = false;  // its stack holds an unfinished thread
    }
    throw;
  }
  check_dynamic_shared(launch.shared_bytes);
}

void barrier(const char* file, int line) {
  suspend(State::at_barrier, {file, line, 0});
}

std::uint64_t exchange(unsigned mask, std::uint64_t value, int from, const char* file, int line) {
  return meet_lanes(mask, value, file, line)[from];
}

unsigned ballot(unsigned mask, bool vote, const char* file, int line) {
  const std::uint64_t* answers = meet_lanes(mask, vote ? 1 : 0, file, line);
  unsigned votes = 0;
  for (std::size_t other = 0; other < kLanes; ++other) {
    votes |= (mask >> other & 1u) != 0 && answers[other] != 0 ? 1u << other : 0u;
  }
  return votes;
}

int running_thread() {
  const Scheduler& own = scheduler();
  return own.running == nullptr ? -1 : static_cast<int>(own.index_of(*own.running));
}

const std::uint64_t* exchange_all(std::uint64_t value, const char* file, int line) {
  return meet_lanes(0xffffffffu, value, file, line);
}

void check_alignment(const void* address, std::size_t bytes, const char* file, int line) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
    throw KernelFault(Wait{file, line, 0}.place() + ": an address is not a multiple of " +
                      std::to_string(bytes) + " bytes");
  }
}

void copy_later(void* to, const void* from, const char* file, int line) {
  check_alignment(to, 16, file, line);
  check_alignment(from, 16, file, line);
  Scheduler& own = scheduler();
  if (own.toss()) {
    copy_now({to, from});
  } else {
    own.running->open.push_back({to, from});
  }
}

void end_copy_group() {
  Fiber& fiber = *scheduler().running;
  fiber.groups.push_back(std::exchange(fiber.open, {}));
}

void wait_for_copies(std::size_t groups_left) {
  std::vector<CopyGroup>& groups = scheduler().running->groups;
  while (groups.size() > groups_left) {
    std::for_each(groups.front().begin(), groups.front().end(), copy_now);
    groups.erase(groups.begin());
  }
}

int lane() {
  const std::size_t index =
      (std::size_t{threadIdx.z} * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  return static_cast<int>(index % kLanes);
}

void* dynamic_shared_memory() {
  return dynamic_shared;
}

}  // namespace cuda_emulation
