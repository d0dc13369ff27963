// The state of a launch, for machine.cpp, warps.cpp, hopper.cpp and wgmma.cpp: threads as
// fibers, the barriers where they meet, and what ThreadSanitizer is told about their order.
//
// Only these files include this one. They are compiled without sanitizers, and the sanitizers'
// functions are weak symbols here. ThreadSanitizer is told that each thread is a fiber, and
// that only barriers order fibers. So it finds every race in a single run, whichever order the
// fibers run in.
#pragma once
#include <random>

#include "hopper.h"

#define WEAK(...) extern "C" __VA_ARGS__ __attribute__((weak))
WEAK(void* __tsan_get_current_fiber());
WEAK(void* __tsan_create_fiber(unsigned));
WEAK(void __tsan_destroy_fiber(void*));
WEAK(void __tsan_switch_to_fiber(void*, unsigned));
WEAK(void __tsan_acquire(void*));
WEAK(void __tsan_release(void*));
WEAK(void __sanitizer_start_switch_fiber(void**, const void*, size_t));
WEAK(void __sanitizer_finish_switch_fiber(void*, const void**, size_t*));
WEAK(void __asan_poison_memory_region(const volatile void*, size_t));
WEAK(void __asan_unpoison_memory_region(const volatile void*, size_t));
// Calls a sanitizer's function where the sanitizer is loaded.
#define HOOK(name, ...) (name ? name(__VA_ARGS__) : decltype(name(__VA_ARGS__))())

namespace emulator {

// ThreadSanitizer knows a lock by its address. One lock orders the threads' own accesses, the
// other those of their asynchronous proxies.
struct Locks {
  char generic;
  char asynchronous;
};

// A place where threads wait for each other.
struct Meeting {
  int arrived = 0;        // threads that wait here
  u32 generation = 0;     // how often threads have met here
  u32 participants = 0;   // a mask of lanes in a warp; a count of threads in a block
  const char* site = "";  // where the first thread waits
  void* slots[32];        // by lane: what it brings, and what it gets
  Locks locks;
};

// An mbarrier. The parity of its phase is the parity of its generation.
struct Barrier : Meeting {
  // One for each parity. With a single lock, an arrival that is one too many would order
  // accesses of a phase that is already over.
  Locks phases[2];
  u32 expected = 0;       // arrivals in a phase
  u32 pending = 0;        // arrivals that the current phase still lacks
  s64 pending_bytes = 0;  // negative: bytes that arrived before they were expected
};

// A tile on its way to shared memory.
struct Fetch : Tile {
  Barrier* barrier;
  u32 generation;  // of the barrier when the fetch began
  u64 number;      // fetches are numbered in the order in which they began
};

// A tile on its way to global memory.
struct Store {
  Tile tile;
  u32 group;
};

// A cp.async that has not been performed.
struct PostponedCopy {
  Copy copy;
  u32 group;
};

constexpr u32 MAX_PRODUCTS = 64;  // of a warp, under way at the same time

// The quarter of a product that one warp of the warpgroup computes: 16 of the 64 rows.
struct Quarter : Product {
  u32 warp = 0;
  u32 lanes_issued = 0;              // how many lanes have issued it
  std::array<u32, 128> sum_offsets;  // the sums' registers, as offsets in every lane's stack
  std::array<u32, 4> a_offsets;      // the registers of a, likewise
  char issue_lock;
  char done_lock;
};

// As a Meeting, its generation counts the products that all lanes have issued.
struct Warp : Meeting {
  std::array<Meeting, 4> lane_groups;  // different sets of lanes can meet at the same time
  std::vector<Quarter> products;       // the last MAX_PRODUCTS
  u32 products_begun = 0;
  u32 products_done = 0;
  void* reader = nullptr;  // the ThreadSanitizer fiber that reads factors
  Quarter& product(u32 index) { return products[index % MAX_PRODUCTS]; }
};

// A thread of the kernel.
struct Fiber : Thread {
  void* stack_pointer = nullptr;  // while another fiber runs
  void* tsan_fiber = nullptr;
  void* async_proxy = nullptr;  // the ThreadSanitizer fiber of the asynchronous proxy
  char* stack = nullptr;
  bool done = false;
  bool polls = false;                  // waits at an mbarrier
  const Meeting* waits_for = nullptr;  // until its generation changes
  u32 waits_for_generation = 0;        // the generation when the wait began
  const char* site = "";               // where it waits
  std::vector<PostponedCopy> copies;
  u32 copy_group = 0;    // the group of the next copy
  size_t next_copy = 0;  // the first copy that has not been performed
  std::vector<Store> stores;
  size_t next_store = 0;  // the first store that has not been performed
  u32 store_group = 0;    // the group of the next store
  char store_lock;
  char fence_lock;
  u32 products_issued = 0;
  u32 products_awaited = 0;
  u32 product_group = 0;                     // the group of the next product
  std::array<u32, MAX_PRODUCTS> group_ends;  // products_issued at the end of each group
};

// One launch.
struct Engine {
  std::vector<Fiber> fibers;  // the threads of the block that runs
  Fiber host;                 // the caller of run()
  std::vector<int> turns;     // the order in which fibers run
  std::vector<Warp> warps;
  std::array<Meeting, 16> barriers;  // of bar.sync
  std::map<u64, Barrier> mbarriers;  // by their addresses
  std::vector<Fetch> fetches;        // that have not been performed, in no order
  Fetch current_fetch;
  u64 fetches_begun = 0;
  void* fetcher = nullptr;  // the ThreadSanitizer fiber that writes tiles
  char fetch_lock;
  u64 shared_start = 0;  // the address of shared memory
  u32 vain_polls = 0;    // of mbarriers since one of them changed
  size_t turn = 0;       // the index in `turns` of the fiber that runs
  std::mt19937 random{1};
  std::string error;
  std::function<std::string()> launch_before;  // performs the launch before this one
  const Kernel* kernel;
  const unsigned char* parameters;
  Locks start;   // of a block
  Locks end;     // of a block
  Locks behind;  // the launch before
};
extern Engine* engine;

constexpr u64 STACK_BYTES = 64 << 10;

// machine.cpp
Fiber* current();
void yield();  // switches to the next fiber that can run, or to the host if there is none
void wait_for(const Meeting& meeting, const char* site);  // until its generation changes
void maybe_yield();                                       // yields in some random schedules
// Waits until `expected` fibers have come. Returns true at once for the last of them, which has
// to call end_meeting(). Returns false for the others once the meeting has ended.
bool meet(Meeting& meeting, int expected, const char* site);
void end_meeting(Meeting& meeting);
void acquire(char& lock);
void release(char& lock);
void acquire(Locks& locks);
void release(Locks& locks);
void act_as(void* tsan_fiber);  // the fiber to which ThreadSanitizer ascribes what follows

// hopper.cpp
void begin_async_launch();
void begin_async_block();
void end_async_block();
void end_async_launch();
Fiber* next_polling_fiber();  // when no other can run; null if polling is in vain
std::string describe_poll(const Fiber& fiber);  // what the mbarrier still lacks
std::string unawaited_work();  // an error if nobody has waited for a fetch, store or product

}  // namespace emulator
