// Which tile and which product is due, and who waits for it; see hopper.h. Compiled without
// sanitizers.
#include "engine.h"

namespace emulator {
namespace {

constexpr size_t TILES = 256;  // under way at a time, at most

Quarter* due;  // what is being read
float factor_a[16][16], factor_b[256][16];

// In one schedule tiles come at once and products are late, in another the other way round
bool tiles_are_late() { return schedule.lazy && schedule.order != "reverse"; }
bool products_are_late() { return schedule.lazy && schedule.order != "random"; }

Barrier& barrier_at(u64 address, const char* site) {
  const auto found = engine->mbarriers.find(checked(Space::shared, address, 8, site));
  if (found == engine->mbarriers.end())
    fail(std::string("an mbarrier that nobody made at ") + site);
  return found->second;
}

bool over(const Barrier& barrier, Any parity) {
  return (barrier.generation & 1) != (parity.bits & 1);
}

void settle(Barrier& b, const char* site) {
  engine->refused = 0;
  if (b.pending) return;
  if (b.bytes < 0)
    fail(std::string("more bytes come to an mbarrier than it expects at ") + site);
  if (b.bytes == 0) b.pending = b.expected, ++b.generation;
}

Tile tile_of(u64 map, Place place, u64 at, const char* site) {
  Tile tile{at, {}, s32(place.column.bits), s32(place.row.bits), site};
  memcpy(&tile.map, reinterpret_cast<const void*>(map), sizeof tile.map);
  if (tile.map.magic != MAP) fail(std::string("a tensor map that nobody encoded at ") + site);
  const u32 aligned = tile.map.swizzled ? 1024 : 128;
  if (at % aligned)
    fail("a tile that does not start at a multiple of " + std::to_string(aligned) + " at " +
         site);
  checked(Space::shared, at, 16, site);
  checked(Space::shared, at + tile.map.width * tile.map.height - 16, 16, site);
  return tile;
}

const Tile* begin_fetch(size_t i) {
  std::vector<Fetch>& fetches = engine->fetches;
  engine->fetched = fetches[i];
  fetches[i] = fetches.back(), fetches.pop_back();
  become(engine->fetcher);
  return &engine->fetched;
}

size_t oldest() {
  size_t found = 0;
  for (size_t i = 1; i < engine->fetches.size(); ++i)
    if (engine->fetches[i].number < engine->fetches[found].number) found = i;
  return found;
}

const Tile* begin_store(Fiber& fiber) {
  become(fiber.asynchronous);
  return &fiber.tiles[fiber.next_tile].first;
}

Quarter& quarter(Warp& warp, u32 i) { return warp.products[i % PRODUCTS]; }
Warp* warpgroup() { return &engine->warps[self->warp / 4 * 4]; }

const Product* begin_product(Quarter& quarter) {
  due = &quarter;
  become(engine->warps[quarter.warp].tsan);
  acquire(quarter.issued);
  return due;
}

void check_descriptor(u64 descriptor, const char* site) {
  if (descriptor >> 62 != 1)
    fail(std::string("a descriptor of another swizzle than 128 bytes at ") + site);
  if (descriptor >> 49 & 7 || tile_address(descriptor) & 0x380)
    fail(std::string("a tile that does not start at a multiple of 1024 at ") + site);
}

// The first lane of a warp says what the others and the other warps have to say too
Quarter& begin_quarter(const Product& product, u32 index) {
  Warp& warp = engine->warps[self->warp];
  if (warp.started - warp.performed == PRODUCTS)
    fail(std::string("too many products under way at ") + product.site);
  if (!product.held) check_descriptor(product.a, product.site);
  check_descriptor(product.b, product.site);
  for (Warp* other = warpgroup(); other < warpgroup() + 4; ++other)
    if (other->started > index && other->started < index + PRODUCTS &&
        quarter(*other, index) != product)
      fail("warps of a warpgroup multiply differently at " +
           std::string(quarter(*other, index).site) + " and " + product.site);
  ++warp.started;
  Quarter& mine = quarter(warp, index);
  static_cast<Product&>(mine) = product;
  mine.warp = self->warp, mine.lanes = 0;
  return mine;
}

// PTX ISA, wgmma.m64nNk16: with g = lane / 4 and t = lane % 4, a warp's registers of A hold
// columns 2t, 2t + 1 of its rows g and g + 8, and then of those 8 further; its sums, of every
// eight columns, 2t and 2t + 1 of these rows.
void take_registers(const Quarter& q, int lane, const char* stack) {
  for (int i = 0; i < 8; ++i) {
    const u32 pair = *reinterpret_cast<const u32*>(stack + q.factor[i / 2]);
    const int row = lane / 4 + i / 2 % 2 * 8, k = lane % 4 * 2 + i / 4 * 8 + i % 2;
    hold(true, row, k, pair >> i % 2 * 16);
  }
}

void add_sums(const Quarter& q, int lane, char* stack) {
  for (u32 i = 0; i < q.columns / 2; ++i) {
    const float *a = factor_a[lane / 4 + i / 2 % 2 * 8],
                *b = factor_b[i / 4 * 8 + lane % 4 * 2 + i % 2];
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += a[k] * b[k];
    float* d = reinterpret_cast<float*>(stack + q.sums[i]);
    *d = q.add ? *d + sum : sum;
  }
}

}  // namespace

void begin_asynchronous() {
  Engine& e = *engine;
  if (!e.kernel->asynchronous) return;
  e.host.asynchronous = e.host.tsan;
  e.fetcher = HOOK(__tsan_create_fiber, 0);
  e.fetches.reserve(TILES);  // else a sanitizer would say that a fiber allocates
  for (Fiber& f : e.fibers)
    f.asynchronous = HOOK(__tsan_create_fiber, 0), f.tiles.reserve(TILES);
  for (Warp& w : e.warps) w.tsan = HOOK(__tsan_create_fiber, 0), w.products.resize(PRODUCTS);
}

void begin_asynchronous_block() {
  Engine& e = *engine;
  e.mbarriers.clear(), e.fetches.clear(), e.refused = 0;
  for (Fiber& f : e.fibers) {
    f.tiles.clear(), f.next_tile = f.tile_group = 0, f.polls = false;
    f.products = f.waited = f.product_group = 0;
  }
  if (!e.kernel->asynchronous) return;
  for (Warp& w : e.warps) {
    w.started = w.performed = 0;
    become(w.tsan), acquire(e.start.usual);
  }
  become(e.fetcher), acquire(e.start.usual);
  become(e.host.tsan);
}

void end_asynchronous_block() {
  Engine& e = *engine;
  if (!e.kernel->asynchronous) return;
  for (Warp& w : e.warps) become(w.tsan), release(e.end.usual);
  become(e.fetcher), release(e.end.usual);
  become(e.host.tsan);
}

void end_asynchronous() {
  Engine& e = *engine;
  if (!e.kernel->asynchronous) return;
  HOOK(__tsan_destroy_fiber, e.fetcher);
  for (Fiber& f : e.fibers) HOOK(__tsan_destroy_fiber, f.asynchronous);
  for (Warp& w : e.warps) HOOK(__tsan_destroy_fiber, w.tsan);
}

Fiber* who_polls() {
  Engine& e = *engine;
  if (e.fetches.empty() && ++e.refused > 64 + 8 * e.fibers.size()) return nullptr;
  for (size_t i = 0; i < e.order.size(); ++i) {
    e.at = (e.at + 1) % e.order.size();
    Fiber& f = e.fibers[e.order[e.at]];
    if (!f.done && f.polls) return &f;
  }
  return nullptr;
}

std::string lacking(const Fiber& fiber) {
  if (!fiber.polls) return "";
  const Barrier& b = static_cast<const Barrier&>(*fiber.waits);
  const std::string arrivals = std::to_string(b.pending), bytes = std::to_string(b.bytes);
  return " (an mbarrier that lacks " + arrivals + " arrivals and " + bytes + " bytes)";
}

std::string left_over() {
  for (const Fetch& f : engine->fetches)
    return std::string("a tile that nobody waits for, fetched at ") + f.site;
  for (Warp& w : engine->warps)
    if (w.performed < w.started)
      return std::string("a product that nobody waits for, issued at ") +
             quarter(w, w.performed).site;
  for (const Fiber& f : engine->fibers)
    if (f.next_tile < f.tiles.size())
      return std::string("a store that nobody waits for, issued at ") +
             f.tiles[f.next_tile].first.site;
  return "";
}

void barrier_init(u64 address, Any count, const char* site) {
  const u32 expected = as<u32>(count);
  const auto [found, made] =
      engine->mbarriers.try_emplace(checked(Space::shared, address, 8, site));
  if (!made) fail(std::string("an mbarrier made twice at ") + site);
  if (!expected || expected >= 1 << 20)
    fail(std::string("an mbarrier of no or too many arrivals at ") + site);
  found->second.expected = found->second.pending = expected;
}

void barrier_inval(u64 address, const char* site) {
  const Barrier& b = barrier_at(address, site);
  bool used = false;
  for (const Fetch& f : engine->fetches) used |= f.barrier == &b;
  for (const Fiber& f : engine->fibers) used |= f.waits == &b;
  if (used) fail(std::string("an mbarrier that is waited for is made invalid at ") + site);
  engine->mbarriers.erase(address);
}

u64 barrier_arrive(u64 address, Any bytes, Any count, const char* site) {
  Barrier& b = barrier_at(address, site);
  if (as<u32>(count) > b.pending)
    fail(std::string("more arrive at an mbarrier than it expects at ") + site);
  const u32 phase = b.generation;
  release(b.phases[phase & 1]);
  b.bytes += as<u32>(bytes), b.pending -= as<u32>(count);
  settle(b, site);
  waver();
  return phase;
}

void barrier_expect(u64 address, Any bytes, const char* site) {
  Barrier& b = barrier_at(address, site);
  b.bytes += as<u32>(bytes);
  settle(b, site);
}

bool barrier_over(u64 address, Any parity, const char* site) {
  Barrier& b = barrier_at(address, site);
  if (!over(b, parity)) return false;
  acquire(b.phases[parity.bits & 1]);
  engine->refused = 0;
  return true;
}

void fence_asynchronous() {
  Fiber& f = *me();
  release(f.fence);
  become(f.asynchronous), acquire(f.fence);
  become(f.tsan);
}

const Tile* fetch(u64 to, u64 map, Place place, u64 barrier, const char* site) {
  Engine& e = *engine;
  Barrier& b = barrier_at(barrier, site);
  const Fetch made{tile_of(map, place, to, site), &b, b.generation, e.made++};
  if (e.fetches.size() == TILES) fail(std::string("too many tiles under way at ") + site);
  release(e.fetching);
  become(me()->asynchronous), release(e.fetching);
  become(e.fetcher), acquire(e.fetching);
  become(me()->tsan);
  e.fetches.push_back(made);
  return tiles_are_late() ? nullptr : begin_fetch(e.fetches.size() - 1);
}

const Tile* due_fetch(u64 address, Any parity, const char* site) {
  const Barrier& b = barrier_at(address, site);
  if (over(b, parity)) return nullptr;
  me()->polls = true;
  wait_for(b, site);
  me()->polls = false;
  const size_t count = engine->fetches.size();
  if (over(b, parity) || !count) return nullptr;
  return begin_fetch(schedule.order == "random" ? engine->random() % count : oldest());
}

void fetched() {
  const Fetch& f = engine->fetched;
  Order& order = f.barrier->phases[f.generation & 1];
  release(order.usual), release(order.asynchronous);
  become(me()->tsan);
  if (f.barrier->generation != f.generation)
    fail(std::string("a tile comes when the phase of its mbarrier is over, fetched at ") +
         f.site);
  f.barrier->bytes -= f.map.width * f.map.height;
  settle(*f.barrier, f.site);
}

const Tile* postpone_store(u64 map, Place place, u64 from, const char* site) {
  Fiber& f = *me();
  if (f.tiles.size() == TILES) fail(std::string("too many tiles under way at ") + site);
  f.tiles.push_back({tile_of(map, place, from, site), f.tile_group});
  return schedule.lazy ? nullptr : begin_store(f);
}

const Tile* due_store(u32 groups_left) {
  Fiber& f = *me();
  if (f.next_tile < f.tiles.size() && f.tiles[f.next_tile].second + groups_left < f.tile_group)
    return begin_store(f);
  if (f.next_tile == f.tiles.size()) f.tiles.clear(), f.next_tile = 0;
  acquire(f.sent);
  return nullptr;
}

void stored() {
  Fiber& f = *me();
  release(f.sent);
  become(f.tsan);
  ++f.next_tile;
}

void commit_tiles() { ++me()->tile_group; }

const Product* issue(const Product& product, u32* const* sums, u32* const* held) {
  Fiber& f = *me();
  Warp& warp = engine->warps[f.warp];
  if (engine->fibers.size() < (f.warp / 4 + 1) * 128)
    fail(std::string("a warpgroup of fewer than four warps at ") + product.site);
  const bool first = f.products == warp.started;
  Quarter& mine = first ? begin_quarter(product, f.products) : quarter(warp, f.products);
  if (mine != product)
    fail(std::string("lanes of a warp multiply differently at ") + mine.site + " and " +
         product.site);
  // Threads run the same function on stacks of their own, so that a register lies at the same
  // place of each.
  auto place = [&](const u32* at) { return u32(reinterpret_cast<const char*>(at) - f.stack); };
  for (u32 i = 0; i < product.columns / 2; ++i) mine.sums[i] = place(sums[i]);
  for (u32 i = 0; i < 4 * product.held; ++i) mine.factor[i] = place(held[i]);
  ++f.products;
  become(f.asynchronous), release(mine.issued);
  become(f.tsan);
  if (++mine.lanes < 32) return nullptr;
  ++warp.generation;
  return products_are_late() ? nullptr : begin_product(mine);
}

// A product is one of four warps: the first of them to wait for it waits until all have issued
// it.
const Product* due_product(u32 groups_left, const char* site) {
  Fiber& f = *me();
  if (groups_left >= PRODUCTS) fail(std::string("too many groups of products at ") + site);
  const u32 until = f.product_group > groups_left
                        ? f.ends[(f.product_group - groups_left - 1) % PRODUCTS]
                        : 0;
  for (Warp* warp = warpgroup(); until && warp < warpgroup() + 4; ++warp)
    while (warp->performed < until) {
      if (warp->performed < warp->generation)
        return begin_product(quarter(*warp, warp->performed));
      wait_for(*warp, site);
    }
  for (Warp* warp = warpgroup(); until > f.waited && warp < warpgroup() + 4; ++warp) {
    char& done = quarter(*warp, until - 1).done;  // of the last, which comes after the others
    acquire(done);
    become(f.asynchronous), acquire(done);
    become(f.tsan);
  }
  f.waited = std::max(f.waited, until);
  return nullptr;
}

u32 first_row() { return due->warp % 4 * 16; }

u64 tile_address(u64 descriptor) {  // of which it holds the low 18 bits
  const u64 low = (descriptor & 0x3fff) << 4;
  return engine->shared + ((low - engine->shared) & 0x3ffff);
}

void hold(bool of_a, u32 i, u32 k, u16 element) {
  (of_a ? factor_a : factor_b)[i][k] = due->brain ? std::bit_cast<float>(u32(element) << 16)
                                                  : float(std::bit_cast<f16>(element));
}

void multiplied() {
  Quarter& q = *due;
  release(q.done);
  become(me()->tsan);
  Fiber* const lanes = &engine->fibers[q.warp * 32];
  for (int lane = 0; lane < 32 && q.held; ++lane) take_registers(q, lane, lanes[lane].stack);
  for (int lane = 0; lane < 32; ++lane) add_sums(q, lane, lanes[lane].stack);
  counts.wgmma += q.warp % 4 == 0;
  ++engine->warps[q.warp].performed;
}

void commit_products() {
  Fiber& f = *me();
  f.ends[f.product_group++ % PRODUCTS] = f.products;
}

}  // namespace emulator
