#include "zsseg/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <set>
#include <thread>
#include <vector>

#include "zsseg/error.h"

namespace zsseg {
namespace {

class ThreadCount {
 public:
  explicit ThreadCount(int count) : previous_(num_threads()) { set_num_threads(count); }
  ~ThreadCount() { set_num_threads(previous_); }

 private:
  int previous_;
};

bool covers_once(std::int64_t begin, std::int64_t end, std::int64_t grain) {
  std::vector<std::atomic<int>> visits(static_cast<std::size_t>(end));
  parallel_for(begin, end, grain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t index = first; index < last; ++index) {
      ++visits[static_cast<std::size_t>(index)];
    }
  });
  for (std::int64_t index = 0; index < end; ++index) {
    if (visits[static_cast<std::size_t>(index)] != (index >= begin ? 1 : 0)) {
      return false;
    }
  }
  return true;
}

TEST(ParallelFor, VisitsEveryIndexOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    const ThreadCount count(threads);
    for (const std::int64_t end : {1, 2, 7, 64, 1009}) {
      for (const std::int64_t grain : {1, 3, 64, 5000}) {
        EXPECT_TRUE(covers_once(0, end, grain)) << threads << ' ' << end << ' ' << grain;
      }
    }
    EXPECT_TRUE(covers_once(5, 17, 4));
  }
}

TEST(ParallelFor, EmptyRangeCallsNothing) {
  parallel_for(3, 3, 1, [](std::int64_t, std::int64_t) { FAIL(); });
}

TEST(ParallelFor, OneGrainStaysOnTheCaller) {
  const ThreadCount count(8);
  int calls = 0;
  parallel_for(0, 100, 100, [&](std::int64_t begin, std::int64_t end) {
    EXPECT_EQ(begin, 0);
    EXPECT_EQ(end, 100);
    ++calls;
  });
  EXPECT_EQ(calls, 1);
}

// Two chunks that wait for each other finish only if two threads run them.
TEST(ParallelFor, UsesASecondThread) {
  const ThreadCount count(2);
  std::atomic<int> arrived{0};
  parallel_for(0, 2, 1, [&](std::int64_t, std::int64_t) {
    ++arrived;
    while (arrived < 2) {
      std::this_thread::yield();
    }
  });
  EXPECT_EQ(arrived, 2);
}

TEST(ParallelFor, GivesEveryThreadASlotOfItsOwn) {
  const ThreadCount count(8);
  for (const int num_slots : {1, 3, 8}) {
    std::vector<std::atomic<bool>> taken(static_cast<std::size_t>(num_slots));
    std::atomic<int> failures{0}, visits{0};
    parallel_for_slots(0, 500, 1, num_slots, [&](int slot, std::int64_t begin, std::int64_t end) {
      visits += static_cast<int>(end - begin);
      if (slot < 0 || slot >= num_slots) {
        ++failures;
        return;
      }
      failures += taken[static_cast<std::size_t>(slot)].exchange(true) ? 1 : 0;
      std::this_thread::yield();
      taken[static_cast<std::size_t>(slot)] = false;
    });
    EXPECT_EQ(failures, 0) << num_slots;
    EXPECT_EQ(visits, 500) << num_slots;
  }
}

TEST(ParallelFor, InsideAnotherRunsInPlace) {
  const ThreadCount count(3);
  std::atomic<int> visits{0};
  parallel_for(0, 8, 1, [&](std::int64_t, std::int64_t) {
    parallel_for(0, 10, 1, [&](std::int64_t first, std::int64_t last) {
      visits += static_cast<int>(last - first);
    });
  });
  EXPECT_EQ(visits, 80);
}

TEST(ParallelFor, ServesManyCallersAtOnce) {
  const ThreadCount count(3);
  std::atomic<int> failures{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 6; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        failures += covers_once(0, 97, 5) ? 0 : 1;
      }
    });
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
  EXPECT_EQ(failures, 0);
}

TEST(ParallelFor, WorksInAForkedChild) {
  const ThreadCount count(3);
  ASSERT_TRUE(covers_once(0, 100, 1));  // the parent has workers by now
  const pid_t child = fork();
  if (child == 0) {
    _exit(covers_once(0, 100, 1) ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(NumThreads, BelowOneIsRefused) {
  EXPECT_THROW(set_num_threads(0), ArgumentError);
  EXPECT_GE(num_threads(), 1);
}

TEST(ThreadLimit, BelongsToTheThreadThatSetsIt) {
  const ThreadCount count(3);
  EXPECT_EQ(set_thread_limit(1), 0);
  EXPECT_EQ(num_threads(), 1);
  int elsewhere = 0;
  std::thread([&] { elsewhere = num_threads(); }).join();
  EXPECT_EQ(elsewhere, 3);
  EXPECT_EQ(set_thread_limit(8), 1);
  EXPECT_TRUE(covers_once(0, 100, 1));
  EXPECT_EQ(set_thread_limit(0), 8);
  EXPECT_EQ(num_threads(), 3);
}

TEST(ThreadLimit, KeepsTheLoopOnAsManyThreads) {
  const ThreadCount count(4);
  set_thread_limit(1);
  std::set<std::thread::id> ids;  // no lock: there is one thread
  parallel_for(0, 64, 1,
               [&](std::int64_t, std::int64_t) { ids.insert(std::this_thread::get_id()); });
  set_thread_limit(0);
  EXPECT_EQ(ids, std::set<std::thread::id>{std::this_thread::get_id()});
}

TEST(ThreadLimit, BelowZeroIsRefused) {
  EXPECT_THROW(set_thread_limit(-1), ArgumentError);
  EXPECT_EQ(set_thread_limit(0), 0);
}

}  // namespace
}  // namespace zsseg
