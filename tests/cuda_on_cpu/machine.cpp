// Runs a block's threads as fibers of one CPU thread. A fiber switches to another where its
// thread waits: at barriers and within warps.
#include <sys/mman.h>

#include <numeric>

#include "engine.h"

extern "C" void switch_stacks(void** save, void* load);
asm(R"(.text
.type switch_stacks,@function
switch_stacks:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp,(%rdi); mov %rsi,%rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
.size switch_stacks,.-switch_stacks
)");

namespace emulator {

Thread* self;
Launch launch;
u64 dynamic_shared;
Schedule schedule;
Counts counts;

Engine* engine;

namespace {

constexpr u64 ARENA = 2 << 20, GAP = 64, SHIFT = 1ull << 60;

unsigned char* const arena = static_cast<unsigned char*>(mmap(
    nullptr, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0));
size_t used;  // bytes of the arena; a launch within a launch takes what comes after them

std::string text(Dim d) {
  return std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z);
}

void switch_to(Fiber& to) {
  Fiber* from = me();
  if (&to == from) return;
  self = &to;
  become(to.tsan);
  void* fake = nullptr;
  HOOK(__sanitizer_start_switch_fiber, from->done ? nullptr : &fake, to.stack, STACK);
  switch_stacks(&from->pointer, to.pointer);
  HOOK(__sanitizer_finish_switch_fiber, fake, nullptr, nullptr);
}

void begin() {
  HOOK(__sanitizer_finish_switch_fiber, nullptr, nullptr, nullptr);
  acquire(engine->start);
  engine->kernel->body(engine->parameters);
  release(engine->end);
  me()->done = true;
  yield();
  abort();
}

// One of the sixteen barriers of a block. Its mask says how many threads it is for.
Meeting& barrier_of(Any barrier, Any threads, const char* site) {
  const u32 id = as<u32>(barrier), count = as<u32>(threads), all = engine->fibers.size();
  if (id > 15 || count % 32 || count > all) fail(std::string("no such barrier at ") + site);
  Meeting& meeting = engine->barriers[id];
  if (meeting.arrived && meeting.mask != (count ? count : all))
    fail(std::string("threads count those who meet differently: ") + meeting.site + " and " +
         site);
  meeting.mask = count ? count : all;
  if (id) meeting.site = site;  // warpgroups may meet there from different lines
  return meeting;
}

void run_block() {
  Engine& e = *engine;
  for (Fiber& f : e.fibers) {
    f.done = false;
    f.waits = nullptr;
    f.group = 0;
    f.next = 0;
    f.copies.clear();
    HOOK(__asan_unpoison_memory_region, f.stack, STACK);
    void** top = reinterpret_cast<void**>(f.stack + STACK) - 2;
    top[0] = reinterpret_cast<void*>(&begin);
    top[1] = nullptr;  // begin() finds the stack aligned as after a call
    f.pointer = top - 6;
  }
  e.barriers.fill({});
  for (Warp& w : e.warps) static_cast<Meeting&>(w) = {}, w.masks.fill({});
  e.at = e.order.size() - 1;
  release(e.start);
  begin_asynchronous_block();
  yield();
  end_asynchronous_block();
  acquire(e.end);
  std::string places;
  for (Fiber& f : e.fibers)
    if (!f.done && f.waits && places.find(f.site) == std::string::npos)
      places += " thread " + text(f.tid) + " at " + f.site + lacking(f);
  if (e.error.empty() && !places.empty())
    e.error = "some threads wait for others that do not come:" + places;
  if (e.error.empty()) e.error = left_over();
}

// The address of `size` bytes of shared memory, between gaps that AddressSanitizer guards.
u64 place(size_t align, size_t size) {
  used = (used + GAP + align - 1) / align * align;
  unsigned char* const at = arena + std::exchange(used, used + size);
  HOOK(__asan_unpoison_memory_region, at, size);
  return u64(at);
}

}  // namespace

Fiber* me() { return static_cast<Fiber*>(self); }
void become(void* tsan) { HOOK(__tsan_switch_to_fiber, tsan, 1); }  // 1: it orders nothing
void acquire(char& lock) { HOOK(__tsan_acquire, &lock); }
void release(char& lock) { HOOK(__tsan_release, &lock); }
void acquire(Order& order) {
  acquire(order.usual);
  if (!me()->asynchronous) return;
  become(me()->asynchronous), acquire(order.asynchronous);
  become(me()->tsan);
}
void release(Order& order) {
  release(order.usual);
  if (!me()->asynchronous) return;
  become(me()->asynchronous), release(order.asynchronous);
  become(me()->tsan);
}

void yield() {
  for (size_t i = 0; i < engine->order.size(); ++i) {
    engine->at = (engine->at + 1) % engine->order.size();
    Fiber& next = engine->fibers[engine->order[engine->at]];
    if (!next.done && !(next.waits && next.waits->generation == next.generation))
      return switch_to(next);
  }
  Fiber* const polling = who_polls();
  switch_to(polling ? *polling : engine->host);
}

void wait_for(const Meeting& meeting, const char* site) {
  Fiber& f = *me();
  f.waits = &meeting;
  f.generation = meeting.generation;
  f.site = site;
  yield();
  f.waits = nullptr;
}

void waver() {
  if (schedule.order == "random" && engine->random() & 1) yield();
}

bool meet(Meeting& meeting, int expected, const char* site) {
  if (meeting.arrived && strcmp(site, meeting.site))
    fail(std::string("threads meet at different places: ") + meeting.site + " and " + site);
  meeting.site = site;
  if (++meeting.arrived == expected) return true;
  wait_for(meeting, site);
  return false;
}

void part(Meeting& meeting) {
  meeting.arrived = 0;
  ++meeting.generation;
  waver();
}

std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

void fail(const std::string& what) {
  engine->error = what + " in block " + text(launch.block) + " thread " + text(self->tid);
  switch_to(engine->host);
  abort();
}

void sync_block(Any barrier, Any threads, const char* site) {
  Meeting& meeting = barrier_of(barrier, threads, site);
  release(meeting.order);
  if (meet(meeting, meeting.mask, site)) part(meeting);
  acquire(meeting.order);
}

void arrive_block(Any barrier, Any threads, const char* site) {
  Meeting& meeting = barrier_of(barrier, threads, site);
  release(meeting.order);
  if (++meeting.arrived == int(meeting.mask)) part(meeting);
}

void wait_for_launch_before() {
  if (auto before = std::exchange(engine->before, nullptr)) {
    if (const std::string error = before(); !error.empty()) fail(error);
    release(engine->behind);
  }
  acquire(engine->behind);
}

u64 from_shared(u64 address) { return address + SHIFT; }

u64 checked(Space space, u64 address, u32 size, const char* site) {
  if (space == Space::generic && address >= SHIFT) space = Space::shared, address -= SHIFT;
  const bool in_arena = address - u64(arena) < ARENA;
  if (address % size)
    fail("address " + std::to_string(address) + " is no multiple of " + std::to_string(size) +
         " at " + site);
  if (address < 4096 || in_arena != (space == Space::shared))
    fail(std::string("an address of another space, or of none, at ") + site);
  return address;
}

bool postponed(Copy copy) {
  if (schedule.lazy) me()->copies.push_back({copy, me()->group});
  return schedule.lazy;
}
void commit_copies() { ++me()->group; }
bool due_copy(u32 groups_left, Copy& copy) {
  Fiber& f = *me();
  if (f.next == f.copies.size() || f.copies[f.next].second + groups_left >= f.group)
    return false;
  copy = f.copies[f.next++].first;
  return true;
}

std::string run(const Kernel& kernel, Dim blocks, Dim threads, size_t dynamic,
                const std::vector<unsigned char>& parameters,
                std::function<std::string()> before) {
  const u64 count = u64(threads.x) * threads.y * threads.z,
            total = u64(blocks.x) * blocks.y * blocks.z;
  if (!count || count > 1024 || !total || blocks.y > 65535 || blocks.z > 65535)
    return "no such grid";
  Engine mine;
  Engine* const outer = std::exchange(engine, &mine);
  Thread* const caller = std::exchange(self, &mine.host);
  const auto saved = std::make_tuple(launch, used, dynamic_shared);
  mine.kernel = &kernel;
  mine.before = std::move(before);
  mine.parameters = parameters.data();

  HOOK(__asan_poison_memory_region, arena + used, ARENA - used);
  mine.shared = u64(arena) + used;
  std::vector<std::pair<u64, size_t>> shared;
  for (const Shared& variable : kernel.shared)
    shared.push_back({* variable.at = place(variable.align, variable.size), variable.size});
  shared.push_back({dynamic_shared = place(128, dynamic), dynamic});

  char* const stacks =
      static_cast<char*>(mmap(nullptr, count * STACK, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  mine.host.stack = outer ? static_cast<Fiber*>(caller)->stack
                          : static_cast<char*>(__builtin_frame_address(0)) - STACK / 2;
  mine.host.tsan = HOOK(__tsan_get_current_fiber);
  mine.warps.resize((count + 31) / 32);
  mine.fibers = std::vector<Fiber>(count);
  for (u32 i = 0; i < count; ++i) {
    Fiber& f = mine.fibers[i];
    f.tid = {i % threads.x, i / threads.x % threads.y, i / (threads.x * threads.y)};
    f.lane = i % 32, f.warp = i / 32, f.stack = stacks + i * STACK,
    f.tsan = HOOK(__tsan_create_fiber, 0);
    f.copies.reserve(256);  // else a sanitizer would say that a fiber allocates
    mine.order.push_back(i);
  }
  begin_asynchronous();
  std::vector<u64> order(total);
  std::iota(order.begin(), order.end(), 0);
  if (schedule.order == "reverse")
    std::reverse(order.begin(), order.end()),
        std::reverse(mine.order.begin(), mine.order.end());
  if (schedule.order == "random") std::shuffle(order.begin(), order.end(), mine.random);
  ++counts.launches;
  for (u64 i : order) {
    if (!mine.error.empty()) break;
    ++counts.blocks;
    launch = {blocks,
              threads,
              {u32(i % blocks.x), u32(i / blocks.x % blocks.y), u32(i / blocks.x / blocks.y)}};
    for (auto [at, size] : shared)  // NaN, without memset, which sanitizers watch
      for (size_t q = 0; q < size; ++q) reinterpret_cast<volatile unsigned char*>(at)[q] = 0xff;
    if (schedule.order == "random")
      std::shuffle(mine.order.begin(), mine.order.end(), mine.random);
    run_block();
  }
  if (mine.error.empty() && mine.before) mine.error = mine.before();
  for (Fiber& f : mine.fibers) HOOK(__tsan_destroy_fiber, f.tsan);
  end_asynchronous();
  munmap(stacks, count * STACK);
  engine = outer, self = caller;
  std::tie(launch, used, dynamic_shared) = saved;
  return mine.error;
}

}  // namespace emulator
