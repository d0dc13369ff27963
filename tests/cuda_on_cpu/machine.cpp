// Runs the threads of a block as fibers on one CPU thread. A fiber switches to another where
// its thread waits: at barriers, within warps, and at mbarriers. Compiled without sanitizers.
#include <sys/mman.h>

#include <numeric>

#include "engine.h"

// Stores the stack pointer in *save and continues on the stack at `load`.
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

constexpr u64 ARENA_BYTES = 2 << 20;
constexpr u64 GAP_BYTES = 64;
constexpr u64 GENERIC_SHIFT = 1ull << 60;  // of a shared address that became a generic one

// Shared memory, below 4 GiB.
unsigned char* const arena =
    static_cast<unsigned char*>(mmap(nullptr, ARENA_BYTES, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0));
size_t
    used_bytes;  // of the arena; a launch that runs within another one takes those after them

std::string text(Dim dim) {
  return std::to_string(dim.x) + "," + std::to_string(dim.y) + "," + std::to_string(dim.z);
}

void switch_to(Fiber& to) {
  Fiber* from = current();
  if (&to == from) return;
  self = &to;
  act_as(to.tsan_fiber);
  void* fake_stack = nullptr;
  HOOK(__sanitizer_start_switch_fiber, from->done ? nullptr : &fake_stack, to.stack,
       STACK_BYTES);
  switch_stacks(&from->stack_pointer, to.stack_pointer);
  HOOK(__sanitizer_finish_switch_fiber, fake_stack, nullptr, nullptr);
}

// What a fiber does.
void run_thread() {
  HOOK(__sanitizer_finish_switch_fiber, nullptr, nullptr, nullptr);
  acquire(engine->start);
  engine->kernel->body(engine->parameters);
  release(engine->end);
  current()->done = true;
  yield();
  abort();
}

// One of the block's sixteen barriers. It records for how many threads the barrier is.
Meeting& barrier_of(Any barrier, Any threads, const char* site) {
  const u32 id = as<u32>(barrier);
  const u32 count = as<u32>(threads);
  const u32 all = engine->fibers.size();
  if (id > 15 || count % 32 || count > all) fail(std::string("no such barrier at ") + site);
  Meeting& meeting = engine->barriers[id];
  const u32 participants = count ? count : all;
  if (meeting.arrived && meeting.participants != participants)
    fail(std::string("threads count those who meet differently: ") + meeting.site + " and " +
         site);
  meeting.participants = participants;
  if (id) meeting.site = site;  // warpgroups may meet there from different lines
  return meeting;
}

void reset(Fiber& fiber) {
  fiber.done = false;
  fiber.waits_for = nullptr;
  fiber.copy_group = 0;
  fiber.next_copy = 0;
  fiber.copies.clear();
  HOOK(__asan_unpoison_memory_region, fiber.stack, STACK_BYTES);
  void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES) - 2;
  top[0] = reinterpret_cast<void*>(&run_thread);
  top[1] = nullptr;               // aligns the stack as a call would
  fiber.stack_pointer = top - 6;  // switch_stacks pops six registers and returns to top[0]
}

// What the threads wait for that have not ended; each line of the kernel once.
std::string waiting_threads() {
  std::string waiting;
  for (const Fiber& fiber : engine->fibers)
    if (!fiber.done && fiber.waits_for && waiting.find(fiber.site) == std::string::npos)
      waiting += " thread " + text(fiber.tid) + " at " + fiber.site + describe_poll(fiber);
  return waiting;
}

void run_block() {
  Engine& e = *engine;
  for (Fiber& fiber : e.fibers) reset(fiber);
  e.barriers.fill({});
  for (Warp& warp : e.warps) {
    static_cast<Meeting&>(warp) = {};
    warp.lane_groups.fill({});
  }
  e.turn = e.turns.size() - 1;
  release(e.start);
  begin_async_block();
  yield();
  end_async_block();
  acquire(e.end);
  const std::string waiting = waiting_threads();
  if (e.error.empty() && !waiting.empty())
    e.error = "some threads wait for others that do not come:" + waiting;
  if (e.error.empty()) e.error = unawaited_work();
}

// The address of `size` bytes of shared memory. AddressSanitizer guards the gaps between such
// places.
u64 allocate_shared(size_t align, size_t size) {
  used_bytes = (used_bytes + GAP_BYTES + align - 1) / align * align;
  unsigned char* const address = arena + used_bytes;
  used_bytes += size;
  HOOK(__asan_unpoison_memory_region, address, size);
  return u64(address);
}

struct Range {
  u64 address;
  size_t size;
};

std::vector<Range> allocate_variables(const Kernel& kernel, size_t dynamic_bytes) {
  HOOK(__asan_poison_memory_region, arena + used_bytes, ARENA_BYTES - used_bytes);
  engine->shared_start = u64(arena) + used_bytes;
  std::vector<Range> ranges;
  for (const Shared& variable : kernel.shared) {
    const u64 address = allocate_shared(variable.align, variable.size);
    *variable.address = address;
    ranges.push_back({.address = address, .size = variable.size});
  }
  dynamic_shared = allocate_shared(128, dynamic_bytes);
  ranges.push_back({.address = dynamic_shared, .size = dynamic_bytes});
  return ranges;
}

// Sets all bytes to 0xff, which is NaN. The sanitizers would see memset, but not this loop.
void fill_with_nan(const std::vector<Range>& ranges) {
  for (const Range& range : ranges) {
    const auto bytes = reinterpret_cast<volatile unsigned char*>(range.address);
    for (size_t i = 0; i < range.size; ++i) bytes[i] = 0xff;
  }
}

void create_fibers(Dim threads, u32 count, char* stacks) {
  engine->warps.resize((count + 31) / 32);
  engine->fibers = std::vector<Fiber>(count);
  for (u32 i = 0; i < count; ++i) {
    Fiber& fiber = engine->fibers[i];
    fiber.tid = {
        .x = i % threads.x, .y = i / threads.x % threads.y, .z = i / (threads.x * threads.y)};
    fiber.lane = i % 32;
    fiber.warp = i / 32;
    fiber.stack = stacks + i * STACK_BYTES;
    fiber.tsan_fiber = HOOK(__tsan_create_fiber, 0);
    fiber.copies.reserve(256);  // else a sanitizer would report that a fiber allocates
    engine->turns.push_back(i);
  }
}

void run_blocks(Dim blocks, Dim threads, u64 count, const std::vector<Range>& shared) {
  Engine& e = *engine;
  std::vector<u64> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (schedule.order == "reverse") {
    std::reverse(order.begin(), order.end());
    std::reverse(e.turns.begin(), e.turns.end());
  }
  if (schedule.order == "random") std::shuffle(order.begin(), order.end(), e.random);
  for (u64 i : order) {
    if (!e.error.empty()) break;
    ++counts.blocks;
    const Dim block{.x = u32(i % blocks.x),
                    .y = u32(i / blocks.x % blocks.y),
                    .z = u32(i / blocks.x / blocks.y)};
    launch = {.blocks = blocks, .threads = threads, .block = block};
    fill_with_nan(shared);
    if (schedule.order == "random") std::shuffle(e.turns.begin(), e.turns.end(), e.random);
    run_block();
  }
}

}  // namespace

Fiber* current() { return static_cast<Fiber*>(self); }
void act_as(void* tsan_fiber) {
  constexpr unsigned NO_SYNC = 1;  // the switch itself orders nothing
  HOOK(__tsan_switch_to_fiber, tsan_fiber, NO_SYNC);
}
void acquire(char& lock) { HOOK(__tsan_acquire, &lock); }
void release(char& lock) { HOOK(__tsan_release, &lock); }
void acquire(Locks& locks) {
  acquire(locks.generic);
  const Fiber& fiber = *current();
  if (!fiber.async_proxy) return;
  act_as(fiber.async_proxy);
  acquire(locks.asynchronous);
  act_as(fiber.tsan_fiber);
}
void release(Locks& locks) {
  release(locks.generic);
  const Fiber& fiber = *current();
  if (!fiber.async_proxy) return;
  act_as(fiber.async_proxy);
  release(locks.asynchronous);
  act_as(fiber.tsan_fiber);
}

void yield() {
  Engine& e = *engine;
  for (size_t i = 0; i < e.turns.size(); ++i) {
    e.turn = (e.turn + 1) % e.turns.size();
    Fiber& next = e.fibers[e.turns[e.turn]];
    const bool waits =
        next.waits_for && next.waits_for->generation == next.waits_for_generation;
    if (!next.done && !waits) return switch_to(next);
  }
  Fiber* const polling = next_polling_fiber();
  switch_to(polling ? *polling : e.host);
}

void wait_for(const Meeting& meeting, const char* site) {
  Fiber& fiber = *current();
  fiber.waits_for = &meeting;
  fiber.waits_for_generation = meeting.generation;
  fiber.site = site;
  yield();
  fiber.waits_for = nullptr;
}

void maybe_yield() {
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

void end_meeting(Meeting& meeting) {
  meeting.arrived = 0;
  ++meeting.generation;
  maybe_yield();
}

std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

void fail(const std::string& error) {
  engine->error = error + " in block " + text(launch.block) + " thread " + text(self->tid);
  switch_to(engine->host);
  abort();
}

void sync_block(Any barrier, Any threads, const char* site) {
  Meeting& meeting = barrier_of(barrier, threads, site);
  release(meeting.locks);
  if (meet(meeting, meeting.participants, site)) end_meeting(meeting);
  acquire(meeting.locks);
}

void arrive_block(Any barrier, Any threads, const char* site) {
  Meeting& meeting = barrier_of(barrier, threads, site);
  release(meeting.locks);
  if (++meeting.arrived == int(meeting.participants)) end_meeting(meeting);
}

void wait_for_launch_before() {
  if (const auto launch_before = std::exchange(engine->launch_before, nullptr)) {
    if (const std::string error = launch_before(); !error.empty()) fail(error);
    release(engine->behind);
  }
  acquire(engine->behind);
}

u64 from_shared(u64 address) { return address + GENERIC_SHIFT; }

u64 checked(Space space, u64 address, u32 size, const char* site) {
  if (space == Space::generic && address >= GENERIC_SHIFT) {
    space = Space::shared;
    address -= GENERIC_SHIFT;
  }
  const bool in_arena = address - u64(arena) < ARENA_BYTES;
  if (address % size)
    fail("address " + std::to_string(address) + " is no multiple of " + std::to_string(size) +
         " at " + site);
  if (address < 4096 || in_arena != (space == Space::shared))
    fail(std::string("an address of another space, or of none, at ") + site);
  return address;
}

bool postpone(Copy copy) {
  Fiber& fiber = *current();
  if (schedule.lazy) fiber.copies.push_back({.copy = copy, .group = fiber.copy_group});
  return schedule.lazy;
}

void commit_copies() { ++current()->copy_group; }

bool next_due_copy(u32 groups_left, Copy& copy) {
  Fiber& fiber = *current();
  if (fiber.next_copy == fiber.copies.size()) return false;
  const PostponedCopy& next = fiber.copies[fiber.next_copy];
  if (next.group + groups_left >= fiber.copy_group) return false;
  copy = next.copy;
  ++fiber.next_copy;
  return true;
}

std::string run(const Kernel& kernel, Dim blocks, Dim threads, size_t dynamic_bytes,
                const std::vector<unsigned char>& parameters,
                std::function<std::string()> launch_before) {
  const u64 thread_count = u64(threads.x) * threads.y * threads.z;
  const u64 block_count = u64(blocks.x) * blocks.y * blocks.z;
  if (!thread_count || thread_count > 1024 || !block_count || blocks.y > 65535 ||
      blocks.z > 65535)
    return "no such grid";
  Engine inner;
  Engine* const outer = std::exchange(engine, &inner);
  Thread* const caller = std::exchange(self, &inner.host);
  const auto saved = std::make_tuple(launch, used_bytes, dynamic_shared);
  inner.kernel = &kernel;
  inner.launch_before = std::move(launch_before);
  inner.parameters = parameters.data();
  const std::vector<Range> shared = allocate_variables(kernel, dynamic_bytes);

  const size_t stacks_bytes = thread_count * STACK_BYTES;
  char* const stacks =
      static_cast<char*>(mmap(nullptr, stacks_bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  char* const frame = static_cast<char*>(__builtin_frame_address(0));
  inner.host.stack = outer ? static_cast<Fiber*>(caller)->stack : frame - STACK_BYTES / 2;
  inner.host.tsan_fiber = HOOK(__tsan_get_current_fiber);
  create_fibers(threads, thread_count, stacks);
  begin_async_launch();
  ++counts.launches;
  run_blocks(blocks, threads, block_count, shared);
  if (inner.error.empty() && inner.launch_before) inner.error = inner.launch_before();
  for (Fiber& fiber : inner.fibers) HOOK(__tsan_destroy_fiber, fiber.tsan_fiber);
  end_async_launch();
  munmap(stacks, stacks_bytes);
  engine = outer;
  self = caller;
  std::tie(launch, used_bytes, dynamic_shared) = saved;
  return inner.error;
}

}  // namespace emulator
