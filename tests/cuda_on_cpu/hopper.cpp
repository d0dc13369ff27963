// mbarriers and tiles: which fetch or store is due, and which threads wait for it. See
// hopper.h. Compiled without sanitizers.
#include "engine.h"

namespace emulator {
namespace {

constexpr size_t MAX_TILES = 256;  // under way at the same time

// The lazy schedules differ: fetches are late unless the order is "reverse", and products are
// late unless it is "random" (wgmma.cpp).
bool are_fetches_late() { return schedule.lazy && schedule.order != "reverse"; }

Barrier& barrier_at(u64 address, const char* site) {
  const auto entry = engine->mbarriers.find(checked(Space::shared, address, 8, site));
  if (entry == engine->mbarriers.end())
    fail(std::string("an mbarrier that nobody made at ") + site);
  return entry->second;
}

bool is_over(const Barrier& barrier, Any parity) {
  return (barrier.generation & 1) != (parity.bits & 1);
}

// Begins the next phase if the current one lacks neither arrivals nor bytes.
void end_complete_phase(Barrier& barrier, const char* site) {
  engine->vain_polls = 0;
  if (barrier.pending) return;
  if (barrier.pending_bytes < 0)
    fail(std::string("more bytes come to an mbarrier than it expects at ") + site);
  if (barrier.pending_bytes == 0) {
    barrier.pending = barrier.expected;
    ++barrier.generation;
  }
}

Tile make_tile(u64 map, Coordinates start, u64 address, const char* site) {
  Tile tile{.address = address,
            .map = {},
            .column = s32(start.column.bits),
            .row = s32(start.row.bits),
            .site = site};
  memcpy(&tile.map, reinterpret_cast<const void*>(map), sizeof tile.map);
  if (tile.map.magic != TENSOR_MAP_MAGIC)
    fail(std::string("a tensor map that nobody encoded at ") + site);
  const u32 alignment = tile.map.swizzled ? 1024 : 128;
  if (address % alignment)
    fail("a tile that does not start at a multiple of " + std::to_string(alignment) + " at " +
         site);
  checked(Space::shared, address, 16, site);
  checked(Space::shared, address + tile.map.box_row_bytes * tile.map.box_rows - 16, 16, site);
  return tile;
}

const Tile* begin_fetch(size_t i) {
  std::vector<Fetch>& fetches = engine->fetches;
  engine->current_fetch = fetches[i];
  fetches[i] = fetches.back();
  fetches.pop_back();
  act_as(engine->fetcher);
  return &engine->current_fetch;
}

size_t oldest_fetch() {
  const std::vector<Fetch>& fetches = engine->fetches;
  size_t oldest = 0;
  for (size_t i = 1; i < fetches.size(); ++i)
    if (fetches[i].number < fetches[oldest].number) oldest = i;
  return oldest;
}

const Tile* begin_store(Fiber& fiber) {
  act_as(fiber.async_proxy);
  return &fiber.stores[fiber.next_store].tile;
}

}  // namespace

void begin_async_launch() {
  if (!engine->kernel->asynchronous) return;
  engine->host.async_proxy = engine->host.tsan_fiber;
  engine->fetcher = HOOK(__tsan_create_fiber, 0);
  engine->fetches.reserve(MAX_TILES);  // else a sanitizer would report that a fiber allocates
  for (Fiber& fiber : engine->fibers) {
    fiber.async_proxy = HOOK(__tsan_create_fiber, 0);
    fiber.stores.reserve(MAX_TILES);
  }
  for (Warp& warp : engine->warps) {
    warp.reader = HOOK(__tsan_create_fiber, 0);
    warp.products.resize(MAX_PRODUCTS);
  }
}

void begin_async_block() {
  engine->mbarriers.clear();
  engine->fetches.clear();
  engine->vain_polls = 0;
  for (Fiber& fiber : engine->fibers) {
    fiber.polls = false;
    fiber.stores.clear();
    fiber.next_store = 0;
    fiber.store_group = 0;
    fiber.products_issued = 0;
    fiber.products_awaited = 0;
    fiber.product_group = 0;
  }
  if (!engine->kernel->asynchronous) return;
  for (Warp& warp : engine->warps) {
    warp.products_begun = 0;
    warp.products_done = 0;
    act_as(warp.reader);
    acquire(engine->start.generic);
  }
  act_as(engine->fetcher);
  acquire(engine->start.generic);
  act_as(engine->host.tsan_fiber);
}

void end_async_block() {
  if (!engine->kernel->asynchronous) return;
  for (Warp& warp : engine->warps) {
    act_as(warp.reader);
    release(engine->end.generic);
  }
  act_as(engine->fetcher);
  release(engine->end.generic);
  act_as(engine->host.tsan_fiber);
}

void end_async_launch() {
  if (!engine->kernel->asynchronous) return;
  HOOK(__tsan_destroy_fiber, engine->fetcher);
  for (Fiber& fiber : engine->fibers) HOOK(__tsan_destroy_fiber, fiber.async_proxy);
  for (Warp& warp : engine->warps) HOOK(__tsan_destroy_fiber, warp.reader);
}

Fiber* next_polling_fiber() {
  Engine& e = *engine;
  if (e.fetches.empty() && ++e.vain_polls > 64 + 8 * e.fibers.size()) return nullptr;
  for (size_t i = 0; i < e.turns.size(); ++i) {
    e.turn = (e.turn + 1) % e.turns.size();
    Fiber& fiber = e.fibers[e.turns[e.turn]];
    if (!fiber.done && fiber.polls) return &fiber;
  }
  return nullptr;
}

std::string describe_poll(const Fiber& fiber) {
  if (!fiber.polls) return "";
  const Barrier& barrier = static_cast<const Barrier&>(*fiber.waits_for);
  const std::string arrivals = std::to_string(barrier.pending);
  const std::string bytes = std::to_string(barrier.pending_bytes);
  return " (an mbarrier that lacks " + arrivals + " arrivals and " + bytes + " bytes)";
}

std::string unawaited_work() {
  if (!engine->fetches.empty())
    return std::string("a tile that nobody waits for, fetched at ") + engine->fetches[0].site;
  for (Warp& warp : engine->warps)
    if (warp.products_done < warp.products_begun)
      return std::string("a product that nobody waits for, issued at ") +
             warp.product(warp.products_done).site;
  for (const Fiber& fiber : engine->fibers)
    if (fiber.next_store < fiber.stores.size())
      return std::string("a store that nobody waits for, issued at ") +
             fiber.stores[fiber.next_store].tile.site;
  return "";
}

void barrier_init(u64 address, Any count, const char* site) {
  const u32 expected = as<u32>(count);
  const auto [entry, is_new] =
      engine->mbarriers.try_emplace(checked(Space::shared, address, 8, site));
  if (!is_new) fail(std::string("an mbarrier made twice at ") + site);
  if (!expected || expected >= 1 << 20)
    fail(std::string("an mbarrier of no or too many arrivals at ") + site);
  Barrier& barrier = entry->second;
  barrier.expected = expected;
  barrier.pending = expected;
}

void barrier_inval(u64 address, const char* site) {
  const Barrier& barrier = barrier_at(address, site);
  bool is_used = false;
  for (const Fetch& fetch : engine->fetches) is_used |= fetch.barrier == &barrier;
  for (const Fiber& fiber : engine->fibers) is_used |= fiber.waits_for == &barrier;
  if (is_used) fail(std::string("an mbarrier that is waited for is made invalid at ") + site);
  engine->mbarriers.erase(address);
}

u64 barrier_arrive(u64 address, Any bytes, Any count, const char* site) {
  Barrier& barrier = barrier_at(address, site);
  if (as<u32>(count) > barrier.pending)
    fail(std::string("more arrive at an mbarrier than it expects at ") + site);
  const u32 phase = barrier.generation;
  release(barrier.phases[phase & 1]);
  barrier.pending_bytes += as<u32>(bytes);
  barrier.pending -= as<u32>(count);
  end_complete_phase(barrier, site);
  maybe_yield();
  return phase;
}

void barrier_expect(u64 address, Any bytes, const char* site) {
  Barrier& barrier = barrier_at(address, site);
  barrier.pending_bytes += as<u32>(bytes);
  end_complete_phase(barrier, site);
}

bool is_phase_over(u64 address, Any parity, const char* site) {
  Barrier& barrier = barrier_at(address, site);
  if (!is_over(barrier, parity)) return false;
  acquire(barrier.phases[parity.bits & 1]);
  engine->vain_polls = 0;
  return true;
}

void fence_async_proxy() {
  Fiber& fiber = *current();
  release(fiber.fence_lock);
  act_as(fiber.async_proxy);
  acquire(fiber.fence_lock);
  act_as(fiber.tsan_fiber);
}

const Tile* add_fetch(u64 target, u64 map, Coordinates start, u64 address, const char* site) {
  Engine& e = *engine;
  const Fiber& fiber = *current();
  Barrier& barrier = barrier_at(address, site);
  Fetch fetch;
  static_cast<Tile&>(fetch) = make_tile(map, start, target, site);
  fetch.barrier = &barrier;
  fetch.generation = barrier.generation;
  fetch.number = e.fetches_begun++;
  if (e.fetches.size() == MAX_TILES) fail(std::string("too many tiles under way at ") + site);
  release(e.fetch_lock);
  act_as(fiber.async_proxy);
  release(e.fetch_lock);
  act_as(e.fetcher);
  acquire(e.fetch_lock);
  act_as(fiber.tsan_fiber);
  e.fetches.push_back(fetch);
  return are_fetches_late() ? nullptr : begin_fetch(e.fetches.size() - 1);
}

const Tile* next_due_fetch(u64 address, Any parity, const char* site) {
  const Barrier& barrier = barrier_at(address, site);
  if (is_over(barrier, parity)) return nullptr;
  Fiber& fiber = *current();
  fiber.polls = true;
  wait_for(barrier, site);
  fiber.polls = false;
  const size_t count = engine->fetches.size();
  if (is_over(barrier, parity) || !count) return nullptr;
  return begin_fetch(schedule.order == "random" ? engine->random() % count : oldest_fetch());
}

void finish_fetch() {
  const Fetch& fetch = engine->current_fetch;
  Barrier& barrier = *fetch.barrier;
  Locks& locks = barrier.phases[fetch.generation & 1];
  release(locks.generic);
  release(locks.asynchronous);
  act_as(current()->tsan_fiber);
  if (barrier.generation != fetch.generation)
    fail(std::string("a tile comes when the phase of its mbarrier is over, fetched at ") +
         fetch.site);
  barrier.pending_bytes -= fetch.map.box_row_bytes * fetch.map.box_rows;
  end_complete_phase(barrier, fetch.site);
}

const Tile* add_store(u64 map, Coordinates start, u64 source, const char* site) {
  Fiber& fiber = *current();
  if (fiber.stores.size() == MAX_TILES)
    fail(std::string("too many tiles under way at ") + site);
  const Tile tile = make_tile(map, start, source, site);
  fiber.stores.push_back({.tile = tile, .group = fiber.store_group});
  return schedule.lazy ? nullptr : begin_store(fiber);
}

const Tile* next_due_store(u32 groups_left) {
  Fiber& fiber = *current();
  if (fiber.next_store < fiber.stores.size() &&
      fiber.stores[fiber.next_store].group + groups_left < fiber.store_group)
    return begin_store(fiber);
  if (fiber.next_store == fiber.stores.size()) {
    fiber.stores.clear();
    fiber.next_store = 0;
  }
  acquire(fiber.store_lock);
  return nullptr;
}

void finish_store() {
  Fiber& fiber = *current();
  release(fiber.store_lock);
  act_as(fiber.tsan_fiber);
  ++fiber.next_store;
}

void commit_stores() { ++current()->store_group; }

}  // namespace emulator
