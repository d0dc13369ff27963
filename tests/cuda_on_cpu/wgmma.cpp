// Products of a warpgroup: which one is due, which threads wait for it, and its sums. See
// hopper.h. Compiled without sanitizers.
#include "engine.h"

namespace emulator {
namespace {

Quarter* due;  // whose factors are being read
float factor_a[16][16];
float factor_b[256][16];

bool are_products_late() { return schedule.lazy && schedule.order != "random"; }

Warp* warpgroup() { return &engine->warps[self->warp / 4 * 4]; }

const Product* begin_product(Quarter& quarter) {
  due = &quarter;
  act_as(engine->warps[quarter.warp].reader);
  acquire(quarter.issue_lock);
  return due;
}

void check_descriptor(u64 descriptor, const char* site) {
  if (descriptor >> 62 != 1)
    fail(std::string("a descriptor of another swizzle than 128 bytes at ") + site);
  if (descriptor >> 49 & 7 || tile_address(descriptor) & 0x380)
    fail(std::string("a tile that does not start at a multiple of 1024 at ") + site);
}

// Records what the first lane of a warp says. The warp's other lanes and the other warps of the
// warpgroup must say the same.
Quarter& begin_quarter(const Product& product, u32 index) {
  Warp& warp = engine->warps[self->warp];
  if (warp.products_begun - warp.products_done == MAX_PRODUCTS)
    fail(std::string("too many products under way at ") + product.site);
  if (!product.a_in_registers) check_descriptor(product.a, product.site);
  check_descriptor(product.b, product.site);
  for (Warp* other = warpgroup(); other < warpgroup() + 4; ++other) {
    const u32 begun = other->products_begun;
    if (begun > index && begun < index + MAX_PRODUCTS && other->product(index) != product)
      fail("warps of a warpgroup multiply differently at " +
           std::string(other->product(index).site) + " and " + product.site);
  }
  ++warp.products_begun;
  Quarter& quarter = warp.product(index);
  static_cast<Product&>(quarter) = product;
  quarter.warp = self->warp;
  quarter.lanes_issued = 0;
  return quarter;
}

// PTX ISA, wgmma.m64nNk16, with g = lane / 4 and t = lane % 4: the registers of A hold columns
// 2t and 2t + 1 of rows g and g + 8, and then columns 2t + 8 and 2t + 9 of the same rows. Of
// every eight columns, the sums hold columns 2t and 2t + 1 of rows g and g + 8. Rows are those
// of the warp's quarter.
void take_registers(const Quarter& quarter, int lane, const char* stack) {
  for (int i = 0; i < 8; ++i) {
    const u32 pair = *reinterpret_cast<const u32*>(stack + quarter.a_offsets[i / 2]);
    const int row = lane / 4 + i / 2 % 2 * 8;
    const int k = lane % 4 * 2 + i / 4 * 8 + i % 2;
    set_element(true, row, k, pair >> i % 2 * 16);
  }
}

void add_sums(const Quarter& quarter, int lane, char* stack) {
  for (u32 i = 0; i < quarter.columns / 2; ++i) {
    const float* a = factor_a[lane / 4 + i / 2 % 2 * 8];
    const float* b = factor_b[i / 4 * 8 + lane % 4 * 2 + i % 2];
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += a[k] * b[k];
    float* d = reinterpret_cast<float*>(stack + quarter.sum_offsets[i]);
    *d = quarter.accumulates ? *d + sum : sum;
  }
}

}  // namespace

const Product* add_product(const Product& product, u32* const* sums, u32* const* a_registers) {
  Fiber& fiber = *current();
  Warp& warp = engine->warps[fiber.warp];
  if (engine->fibers.size() < (fiber.warp / 4 + 1) * 128)
    fail(std::string("a warpgroup of fewer than four warps at ") + product.site);
  const u32 index = fiber.products_issued;
  const bool is_first_lane = index == warp.products_begun;
  Quarter& quarter = is_first_lane ? begin_quarter(product, index) : warp.product(index);
  if (quarter != product)
    fail(std::string("lanes of a warp multiply differently at ") + quarter.site + " and " +
         product.site);
  // All threads run the same function, so a register has the same offset in each stack.
  const auto offset = [&](const u32* address) {
    return u32(reinterpret_cast<const char*>(address) - fiber.stack);
  };
  const u32 sum_count = product.columns / 2;
  for (u32 i = 0; i < sum_count; ++i) quarter.sum_offsets[i] = offset(sums[i]);
  const u32 a_count = product.a_in_registers ? 4 : 0;
  for (u32 i = 0; i < a_count; ++i) quarter.a_offsets[i] = offset(a_registers[i]);
  ++fiber.products_issued;
  act_as(fiber.async_proxy);
  release(quarter.issue_lock);
  act_as(fiber.tsan_fiber);
  if (++quarter.lanes_issued < 32) return nullptr;
  ++warp.generation;
  return are_products_late() ? nullptr : begin_product(quarter);
}

// Performs a product for all four warps. A thread that comes here before some lane has issued
// the product waits for that lane.
const Product* next_due_product(u32 groups_left, const char* site) {
  Fiber& fiber = *current();
  if (groups_left >= MAX_PRODUCTS) fail(std::string("too many groups of products at ") + site);
  u32 end = 0;  // products before this one are due
  if (fiber.product_group > groups_left)
    end = fiber.group_ends[(fiber.product_group - groups_left - 1) % MAX_PRODUCTS];
  if (!end) return nullptr;
  for (Warp* warp = warpgroup(); warp < warpgroup() + 4; ++warp)
    while (warp->products_done < end) {
      if (warp->products_done < warp->generation)
        return begin_product(warp->product(warp->products_done));
      wait_for(*warp, site);
    }
  if (end <= fiber.products_awaited) return nullptr;
  for (Warp* warp = warpgroup(); warp < warpgroup() + 4; ++warp) {
    char& done_lock = warp->product(end - 1).done_lock;  // products are done in order
    acquire(done_lock);
    act_as(fiber.async_proxy);
    acquire(done_lock);
    act_as(fiber.tsan_fiber);
  }
  fiber.products_awaited = end;
  return nullptr;
}

u32 first_row() { return due->warp % 4 * 16; }

// A descriptor holds the low 18 bits of the address, without the last four.
u64 tile_address(u64 descriptor) {
  const u64 low_bits = (descriptor & 0x3fff) << 4;
  return engine->shared_start + ((low_bits - engine->shared_start) & 0x3ffff);
}

void set_element(bool of_a, u32 i, u32 k, u16 element) {
  const float value = due->is_bf16 ? std::bit_cast<float>(u32(element) << 16)
                                   : float(std::bit_cast<f16>(element));
  (of_a ? factor_a : factor_b)[i][k] = value;
}

void finish_product() {
  Quarter& quarter = *due;
  release(quarter.done_lock);
  act_as(current()->tsan_fiber);
  Fiber* const lanes = &engine->fibers[quarter.warp * 32];
  if (quarter.a_in_registers)
    for (int lane = 0; lane < 32; ++lane) take_registers(quarter, lane, lanes[lane].stack);
  for (int lane = 0; lane < 32; ++lane) add_sums(quarter, lane, lanes[lane].stack);
  if (quarter.warp % 4 == 0) ++counts.wgmma;
  ++engine->warps[quarter.warp].products_done;
}

void commit_products() {
  Fiber& fiber = *current();
  fiber.group_ends[fiber.product_group++ % MAX_PRODUCTS] = fiber.products_issued;
}

}  // namespace emulator
