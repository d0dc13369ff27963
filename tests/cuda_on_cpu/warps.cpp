// What the lanes of a warp do together: they wait for each other, exchange values and multiply
// on tensor cores.
#include "engine.h"

namespace emulator {
namespace {

// Waits for the other lanes of the mask. The last one to come calls `act` with what all bring.
template <class T, class F>
void together(Any mask, const char* site, T& brought, F act) {
  const u32 lanes = as<u32>(mask),
            there = std::min<size_t>(32, engine->fibers.size() - self->warp * 32);
  if (!(lanes >> self->lane & 1))
    fail(std::string("a lane outside of its own mask at ") + site);
  if (there < 32 && lanes >> there)
    fail(std::string("a mask of lanes that do not exist at ") + site);
  Meeting* meeting = nullptr;  // of these lanes, or one that is free
  for (Meeting& m : engine->warps[self->warp].masks)
    if (m.arrived ? m.mask == lanes : !meeting) meeting = &m;
  if (!meeting) fail("more than four masks of a warp at a time");
  meeting->mask = lanes;
  meeting->brought[self->lane] = &brought;
  if (!meet(*meeting, std::popcount(lanes), site)) return;
  act(reinterpret_cast<T**>(meeting->brought), lanes);
  part(*meeting);
}

}  // namespace

void sync_warp(Any mask, const char* site) {
  Order& order = engine->warps[self->warp].order;
  release(order);
  together(mask, site, *self, [](Thread**, u32) {});
  acquire(order);
}

std::array<u64, 32> gather(Any mask, u64 value, const char* site) {
  struct Brought {
    u64 value;
    std::array<u64, 32> all;
  } mine{value, {}};
  together(mask, site, mine, [](Brought** lanes, u32 mask) {
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 32 && mask >> i & 1; ++j)
        if (mask >> j & 1) lanes[i]->all[j] = lanes[j]->value;
  });
  return mine.all;
}

std::array<u64, 2> shuffle(char mode, Any value, Any lane, Any clamp, Any mask,
                           const char* site) {
  const int l = self->lane, b = as<s32>(lane), c = as<u32>(clamp) & 31,
            segment = as<u32>(clamp) >> 8 & 31;
  const int most = (l & segment) | (c & ~segment),
            in_segment = (l & segment) | (b & ~segment & 31);
  int from = in_segment;
  if (mode == 'u') from = l - b;
  if (mode == 'd') from = l + b;
  if (mode == 'b') from = l ^ b;
  const bool inside = mode == 'u' ? from >= most : from <= most;
  const auto values = gather(mask, value.bits, site);
  if (inside && !(mask.bits >> from & 1))
    fail(std::string("a shuffle reads a lane outside of the mask at ") + site);
  return {values[inside ? from : l], inside};
}

// PTX ISA, mma.m16n8k16: with g = lane / 4 and t = lane % 4, A holds rows g and g + 8 of
// columns 2t, 2t + 1 and then of those 8 further, B the same rows of its column g, and D
// columns 2t, 2t + 1 of rows g and g + 8.
std::array<f32, 4> multiply(bool brain, const Any (&a)[4], const Any (&b)[2], const Any (&c)[4],
                            const char* site) {
  struct Brought {
    const Any (&a)[4], (&b)[2];
    std::array<f32, 4> d;
  } mine{a, b, {}};
  for (int q = 0; q < 4; ++q) mine.d[q] = as<f32>(c[q]);
  together(~0u, site, mine, [brain](Brought** lanes, u32) {
    ++counts.mma;
    float wa[16][16], wb[16][8];
    auto half = [&](u64 bits) { return brain ? float(as<bf16>(bits)) : float(as<f16>(bits)); };
    for (int i = 0; i < 64; ++i) {
      const int l = i / 2, g = l / 4, t = l % 4 * 2 + i % 2;
      for (int q = 0; q < 4; ++q)
        wa[g + q % 2 * 8][t + q / 2 * 8] = half(lanes[l]->a[q].bits >> i % 2 * 16);
      for (int q = 0; q < 2; ++q) wb[t + q * 8][g] = half(lanes[l]->b[q].bits >> i % 2 * 16);
    }
    for (int i = 0; i < 128; ++i) {
      const int l = i / 4, q = i % 4;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += wa[l / 4 + q / 2 * 8][k] * wb[k][l % 4 * 2 + q % 2];
      lanes[l]->d[q] += sum;
    }
  });
  return mine.d;
}

// PTX ISA, ldmatrix: lane 8m + i names row i of matrix m, and lane l gets columns l % 4 * 2 and
// the next of row l / 4.
void transpose_matrices(int count, bool turned, u64 address, const u16* row, u32* out,
                        const char* site) {
  struct Brought {
    u64 address;
    const u16* row;
    u32* out;
  } mine{address, row, out};
  together(~0u, site, mine, [=](Brought** lanes, u32) {
    for (int m = 0; m < count; ++m) {
      int hits[8] = {}, worst = 0;
      for (int i = 0; i < 8; ++i)
        worst = std::max(worst, ++hits[lanes[8 * m + i]->address / 16 % 8]);
      counts.conflicts += worst - 1;
      ++counts.matrices;
      auto at = [&](int i, int j) {
        return u32(turned ? lanes[8 * m + j]->row[i] : lanes[8 * m + i]->row[j]);
      };
      for (int l = 0; l < 32; ++l)
        lanes[l]->out[m] = at(l / 4, l % 4 * 2) | at(l / 4, l % 4 * 2 + 1) << 16;
    }
  });
}

}  // namespace emulator
