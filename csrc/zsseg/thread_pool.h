// Splits loops over threads that sleep when there is nothing to do. No OpenMP: its barriers spin,
// which on a busy machine turns a 0.2 ms kernel into 16 ms.
#pragma once

#include <cstdint>

namespace zsseg {

// Threads that a loop of the calling thread may use, the caller included: the thread's own limit if
// it has one, else the process's count, which starts as the CPUs this process may run on.
int num_threads();
void set_num_threads(int count);  // of the process; throws ArgumentError below 1

// Sets the calling thread's limit, 0 for none, and returns the one before; throws ArgumentError
// below 0. Two threads with limits of their own do not change each other's loops.
int set_thread_limit(int count);

using RangeFunction = void (*)(void* context, int slot, std::int64_t begin, std::int64_t end);

// Calls function on disjoint ranges that cover [begin, end) and returns when all are done. Ranges
// start at begin + k * grain and are at most grain long unless one thread takes them all; a loop of
// one grain runs on the caller alone, so grain is how work too small for a second thread stays on
// one (waking one takes tens of microseconds). At most max_threads threads take part; each has a
// slot below that number of its own while the loop runs, to find its scratch memory by. function
// must not throw. Callable from many threads at once; a loop inside a loop runs on the thread that
// reaches it.
void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain, int max_threads,
                  RangeFunction function, void* context);

// As above for a callable (begin, end).
template <typename Body>
inline __attribute__((always_inline)) void parallel_for(std::int64_t begin, std::int64_t end,
                                                        std::int64_t grain, const Body& body) {
  parallel_for(
      begin, end, grain, num_threads(),
      [](void* context, int, std::int64_t first, std::int64_t last) {
        (*static_cast<const Body*>(context))(first, last);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// As above for a callable (slot, begin, end).
template <typename Body>
inline __attribute__((always_inline)) void parallel_for_slots(std::int64_t begin, std::int64_t end,
                                                              std::int64_t grain, int num_slots,
                                                              const Body& body) {
  parallel_for(
      begin, end, grain, num_slots,
      [](void* context, int slot, std::int64_t first, std::int64_t last) {
        (*static_cast<const Body*>(context))(slot, first, last);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace zsseg
