#include "zsseg/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "zsseg/error.h"

namespace zsseg {
namespace {

// One parallel_for: lives on its caller's stack; the helper counts and the queue link are guarded
// by the pool's mutex.
struct Loop {
  RangeFunction function;
  void* context;
  std::int64_t end;
  std::int64_t grain;
  std::atomic<std::int64_t> next;
  int wanted_helpers;
  int active_helpers = 0;
  std::atomic<int> next_slot{0};
  std::condition_variable helpers_left{};
  Loop* next_in_queue = nullptr;

  void run() {
    const int slot = next_slot.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
      const std::int64_t first = next.fetch_add(grain, std::memory_order_relaxed);
      if (first >= end) {
        return;
      }
      function(context, slot, first, std::min(first + grain, end));
    }
  }
};

thread_local bool inside_loop = false;
thread_local int thread_limit = 0;  // 0: none of its own

class ThreadPool {
 public:
  void run(Loop& loop) {
    int helpers = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start_workers(loop.wanted_helpers);
      helpers = loop.wanted_helpers = std::min(loop.wanted_helpers, num_workers_);
      if (helpers > 0) {
        loop.next_in_queue = queue_;
        queue_ = &loop;
      }
    }
    for (int helper = 0; helper < helpers; ++helper) {
      work_arrived_.notify_one();
    }
    inside_loop = true;
    loop.run();
    inside_loop = false;
    std::unique_lock<std::mutex> lock(mutex_);
    unlink(loop);
    loop.helpers_left.wait(lock, [&] { return loop.active_helpers == 0; });
  }

 private:
  // A system out of threads still gets its work done by those there are.
  void start_workers(int count) {
    try {
      for (; num_workers_ < count; ++num_workers_) {
        std::thread([this] { work(); }).detach();
      }
    } catch (const std::system_error&) {
      return;
    }
  }

  [[noreturn]] void work() {
    inside_loop = true;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_arrived_.wait(lock, [this] { return queue_ != nullptr; });
      Loop& loop = *queue_;
      ++loop.active_helpers;
      if (--loop.wanted_helpers == 0) {
        queue_ = loop.next_in_queue;
      }
      lock.unlock();
      loop.run();
      lock.lock();
      if (--loop.active_helpers == 0) {
        loop.helpers_left.notify_one();
      }
    }
  }

  void unlink(const Loop& loop) {
    for (Loop** link = &queue_; *link != nullptr; link = &(*link)->next_in_queue) {
      if (*link == &loop) {
        *link = loop.next_in_queue;
        return;
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable work_arrived_;
  Loop* queue_ = nullptr;
  int num_workers_ = 0;
};

std::atomic<ThreadPool*> pool{nullptr};
std::atomic<int> thread_count{0};

// Workers do not survive a fork and the mutex may have been held by one of them: the child forgets
// the pool and makes its own on first use.
void forget_pool() {
  pool.store(nullptr);
  inside_loop = false;
}

// Never destroyed: its workers sleep in it until the process ends.
ThreadPool& the_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  static_cast<void>(registered);
  ThreadPool* current = pool.load();
  if (current == nullptr) {
    auto* fresh = new ThreadPool;
    if (pool.compare_exchange_strong(current, fresh)) {
      return *fresh;
    }
    delete fresh;
  }
  return *current;
}

int usable_cpus() {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) {
    return std::max(1, CPU_COUNT(&cpus));
  }
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

int num_threads() {
  if (thread_limit > 0) {
    return thread_limit;
  }
  int count = thread_count.load(std::memory_order_relaxed);
  if (count == 0) {
    count = usable_cpus();
    thread_count.store(count, std::memory_order_relaxed);
  }
  return count;
}

void set_num_threads(int count) {
  if (count < 1) {
    throw ArgumentError("num_threads: expected at least 1, got " + std::to_string(count) +
                        ". Pass 1 to use the calling thread only.");
  }
  thread_count.store(count);
}

int set_thread_limit(int count) {
  if (count < 0) {
    throw ArgumentError("thread limit: expected at least 1, or 0 for none, got " +
                        std::to_string(count) + ". Pass 0 to use the process's count.");
  }
  return std::exchange(thread_limit, count);
}

void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain, int max_threads,
                  RangeFunction function, void* context) {
  if (begin >= end) {
    return;
  }
  grain = std::max<std::int64_t>(grain, 1);
  const std::int64_t num_grains = (end - begin + grain - 1) / grain;
  const auto threads =
      static_cast<int>(std::min<std::int64_t>(std::min(num_threads(), max_threads), num_grains));
  if (threads == 1 || inside_loop) {
    function(context, 0, begin, end);
    return;
  }
  Loop loop{function, context, end, grain, {begin}, threads - 1};
  the_pool().run(loop);
}

}  // namespace zsseg
