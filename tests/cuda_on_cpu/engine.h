// A launch as machine.cpp, warps.cpp and hopper.cpp see it: threads as fibers, the places where
// they meet, and what orders them.
//
// Only these three include this file. They are compiled without sanitizers, whose hooks are
// weak symbols here. ThreadSanitizer is told of each fiber, and that only barriers order
// fibers. So one run finds every race, whatever order the run took.
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

// What ThreadSanitizer takes for a lock: one for usual accesses and one for those of the
// asynchronous proxy.
struct Order {
  char usual, asynchronous;
};
// A place where threads wait for each other.
struct Meeting {
  int arrived = 0;        // threads that wait
  u32 generation = 0;     // how often threads have met
  u32 mask = 0;           // lanes of a warp, or threads of a block, that have to come
  const char* site = "";  // the line of the kernel
  void* brought[32];      // by each lane
  Order order;
};
// An mbarrier. The parity of its phase is that of its generation.
struct Barrier : Meeting {
  // One for each parity. With a single one, an arrival too many would order accesses of a phase
  // that it comes too late for.
  Order phases[2];
  u32 expected = 0, pending = 0;  // arrivals, and those that the phase still lacks
  s64 bytes = 0;  // that have to come; below zero, that came before they were expected
};
// A tile on its way to shared memory.
struct Fetch : Tile {
  Barrier* barrier;
  u32 generation;  // the barrier's when the fetch began
  u64 number;      // of the fetch
};

constexpr u32 PRODUCTS = 64;  // of a warp that are under way at a time, at most
// The part of one warp in a product of four warps.
struct Quarter : Product {
  u32 warp = 0;
  u32 lanes = 0;              // that have issued it
  std::array<u32, 128> sums;  // where the registers of the sums lie in every lane's stack
  std::array<u32, 4> factor;  // the same of the registers of a
  char issued, done;          // locks
};
// The generation counts products that all lanes have issued.
struct Warp : Meeting {
  std::array<Meeting, 4> masks;  // sets of lanes that meet at a time
  std::vector<Quarter> products;
  u32 started = 0, performed = 0;  // products
  void* tsan = nullptr;            // the fiber of ThreadSanitizer that reads for products
};

// A thread of the kernel.
struct Fiber : Thread {
  void* pointer = nullptr;       // the stack pointer while others run
  void* tsan = nullptr;          // ThreadSanitizer's fiber
  void* asynchronous = nullptr;  // and that of the thread's asynchronous proxy
  char* stack = nullptr;
  bool done = false;
  bool polls = false;                        // waits at an mbarrier
  const Meeting* waits = nullptr;            // until its generation is another
  u32 generation = 0;                        // that one's, when the wait began
  const char* site = "";                     // where it waits
  std::vector<std::pair<Copy, u32>> copies;  // cp.async and their groups
  u32 group = 0;                             // of the next copy
  size_t next = 0;                           // copy to perform
  std::vector<std::pair<Tile, u32>> tiles;   // on their way to global memory, and their groups
  size_t next_tile = 0;                      // to send
  u32 tile_group = 0;                        // of the next tile
  char sent, fence;                          // locks
  u32 products = 0, waited = 0;              // issued, and known to be performed
  u32 product_group = 0;                     // of the next product
  std::array<u32, PRODUCTS> ends;            // of groups of products
};
// One launch.
struct Engine {
  std::vector<Fiber> fibers;  // of the block that runs
  Fiber host;                 // the caller
  std::vector<int> order;     // in which fibers take turns
  std::vector<Warp> warps;
  std::array<Meeting, 16> barriers;
  std::map<u64, Barrier> mbarriers;
  std::vector<Fetch> fetches;  // tiles on their way to shared memory
  Fetch fetched;               // that is being performed
  u64 made = 0;                // fetches so far
  void* fetcher = nullptr;     // the fiber of ThreadSanitizer that writes tiles
  char fetching;               // a lock
  u64 shared = 0;              // where shared memory begins
  u32 refused = 0;             // tries of mbarriers since something changed
  size_t at = 0;               // the fiber that runs, in `order`
  std::mt19937 random{1};
  std::string error;
  std::function<std::string()> before;  // performs the launch before this one
  const Kernel* kernel;
  const unsigned char* parameters;
  Order start, end, behind;
};
extern Engine* engine;

constexpr u64 STACK = 64 << 10;

Fiber* me();
void yield();  // switches to the next fiber that can run, or to the host if there is none
void wait_for(const Meeting& meeting, const char* site);  // waits for its next generation
void waver();  // in a random schedule, may let others run
// True for the last of `expected` fibers to come, which then has to part() the others. These
// get false once they may go on.
bool meet(Meeting& meeting, int expected, const char* site);
void part(Meeting& meeting);
void acquire(char& lock);
void release(char& lock);
void acquire(Order& order);
void release(Order& order);
void become(void* tsan);  // tells ThreadSanitizer which of its fibers does what follows

// hopper.cpp
void begin_asynchronous();  // a launch
void begin_asynchronous_block();
void end_asynchronous_block();
void end_asynchronous();
Fiber* who_polls();                       // who goes on where nobody can, or null
std::string lacking(const Fiber& fiber);  // what the mbarrier that this one waits at lacks
std::string left_over();                  // what nobody has waited for

}  // namespace emulator
