// A launch as machine.cpp and hopper.cpp see it: threads as fibers, where they meet, and what
// orders them.
//
// Private to these two, which are compiled without sanitizers; their hooks are weak symbols
// here. ThreadSanitizer is told of each fiber, and that only barriers order them, so one run
// finds every race, whatever the order it took.
#pragma once
#include <random>

#include "machine.h"

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
#define HOOK(name, ...) (name ? name(__VA_ARGS__) : decltype(name(__VA_ARGS__))())

namespace emulator {

// What ThreadSanitizer takes for a lock, once for accesses as usual and once for those of the
// asynchronous proxy
struct Order {
  char usual, asynchronous;
};
struct Meeting {
  int arrived = 0;
  u32 generation = 0, mask = 0;
  const char* site = "";
  void* brought[32];
  Order order;
};
struct Barrier : Meeting {  // an mbarrier; the parity of its phase is that of its generation
  Order phases[2];  // for each parity, else an arrival too many would order what it comes too
                    // late for
  u32 expected = 0, pending = 0;
  s64 bytes = 0;  // that have to come, or, below zero, that came before they were expected
};
struct Fetch : Tile {
  Barrier* barrier;
  u32 generation;  // the barrier's, at that time
  u64 number;
};

constexpr u32 PRODUCTS = 64;  // of a warp that are under way at a time, at most
struct Quarter : Product {    // of a product of four warps
  u32 warp = 0, lanes = 0;    // that have issued it
  std::array<u32, 128> sums;  // where their registers are on every lane's stack
  std::array<u32, 4> factor;  // likewise those of a
  char issued, done;          // locks
};
struct Warp : Meeting {          // the generation counts products that all lanes have issued
  std::array<Meeting, 4> masks;  // up to four of them meet at a time
  std::vector<Quarter> products;
  u32 started = 0, performed = 0;
  void* tsan = nullptr;  // who reads for products
};

struct Fiber : Thread {
  void *pointer = nullptr, *tsan = nullptr,
       *asynchronous = nullptr;  // what this thread's asynchronous proxy has seen
  char* stack = nullptr;
  bool done = false, polls = false;  // at an mbarrier
  const Meeting* waits = nullptr;    // until its generation is another
  const char* site = "";
  u32 generation = 0, group = 0;
  std::vector<std::pair<Copy, u32>> copies;
  size_t next = 0;
  std::vector<std::pair<Tile, u32>> tiles;  // on their way to global memory
  size_t next_tile = 0;
  u32 tile_group = 0;
  char sent, fence;              // locks
  u32 products = 0, waited = 0;  // issued, and known to be performed
  u32 product_group = 0;
  std::array<u32, PRODUCTS> ends;  // of groups of products
};
struct Engine {  // of one launch
  std::vector<Fiber> fibers;
  Fiber host;
  std::vector<int> order;
  std::vector<Warp> warps;
  std::array<Meeting, 16> barriers;
  std::map<u64, Barrier> mbarriers;
  std::vector<Fetch> fetches;  // tiles on their way to shared memory
  Fetch fetched;
  u64 made = 0;             // of them
  void* fetcher = nullptr;  // who writes them
  char fetching;            // a lock
  u64 shared = 0;           // where shared memory begins
  u32 refused = 0;          // tries of mbarriers since something changed
  size_t at = 0;
  std::mt19937 random{1};
  std::string error;
  std::function<std::string()> before;
  const Kernel* kernel;
  const unsigned char* parameters;
  Order start, end, behind;
};
extern Engine* engine;

constexpr u64 STACK = 64 << 10;

Fiber* me();
void yield();  // to the next that can run, or to the host where none can
void wait_for(const Meeting& meeting, const char* site);  // its next generation
void waver();  // in a random schedule: others may run
// True for the last of `expected` to come, who then has to part() the others; false for these,
// once they may go on.
bool meet(Meeting& meeting, int expected, const char* site);
void part(Meeting& meeting);
void acquire(char& lock);
void release(char& lock);
void acquire(Order& order);
void release(Order& order);
void become(void* tsan);  // who does what follows, in ThreadSanitizer's eyes

// hopper.cpp
void begin_asynchronous();  // a launch
void begin_asynchronous_block();
void end_asynchronous_block();
void end_asynchronous();
Fiber* who_polls();                       // who goes on where nobody can, or null
std::string lacking(const Fiber& fiber);  // what the mbarrier that this one waits at lacks
std::string left_over();                  // what nobody has waited for

}  // namespace emulator
