// What the lanes of a warp do together: they wait for each other, exchange values and multiply
// on tensor cores. Compiled without sanitizers.
#include "engine.h"

namespace emulator {
namespace {

// Waits for the other lanes of the mask. Each lane brings a slot. The last lane to come calls
// `act` with the slots of all lanes, where it reads what they bring and writes what they get.
template <class Slot, class F>
void meet_lanes(Any mask, const char* site, Slot& slot, F act) {
  const u32 lanes = as<u32>(mask);
  const u32 existing = std::min<size_t>(32, engine->fibers.size() - self->warp * 32);
  if (!(lanes >> self->lane & 1))
    fail(std::string("a lane outside of its own mask at ") + site);
  if (existing < 32 && lanes >> existing)
    fail(std::string("a mask of lanes that do not exist at ") + site);
  Meeting* meeting = nullptr;  // where lanes of this mask wait, or else a free one
  for (Meeting& group : engine->warps[self->warp].lane_groups) {
    const bool is_ours = group.arrived && group.participants == lanes;
    const bool is_first_free = !group.arrived && !meeting;
    if (is_ours || is_first_free) meeting = &group;
  }
  if (!meeting) fail("more than four masks of a warp at a time");
  meeting->participants = lanes;
  meeting->slots[self->lane] = &slot;
  if (!meet(*meeting, std::popcount(lanes), site)) return;
  act(reinterpret_cast<Slot**>(meeting->slots), lanes);
  end_meeting(*meeting);
}

}  // namespace

void sync_warp(Any mask, const char* site) {
  Locks& locks = engine->warps[self->warp].locks;
  release(locks);
  meet_lanes(mask, site, *self, [](Thread**, u32) {});
  acquire(locks);
}

std::array<u64, 32> gather(Any mask, u64 value, const char* site) {
  struct Slot {
    u64 value;
    std::array<u64, 32> gathered;
  } mine{.value = value, .gathered = {}};
  meet_lanes(mask, site, mine, [](Slot** slots, u32 lanes) {
    for (int to = 0; to < 32; ++to) {
      if (!(lanes >> to & 1)) continue;
      for (int from = 0; from < 32; ++from)
        if (lanes >> from & 1) slots[to]->gathered[from] = slots[from]->value;
    }
  });
  return mine.gathered;
}

// PTX ISA, shfl.sync. clamp: bits 0 to 4 limit the lane within its segment. Bits 8 to 12 are a
// mask: lanes that agree in these bits are of the same segment.
std::array<u64, 2> shuffle(char mode, Any value, Any lane, Any clamp, Any mask,
                           const char* site) {
  const int own = self->lane;
  const int operand = as<s32>(lane);
  const int last = as<u32>(clamp) & 31;
  const int segment_mask = as<u32>(clamp) >> 8 & 31;
  const int segment = own & segment_mask;
  const int limit = segment | (last & ~segment_mask);
  int from = segment | (operand & ~segment_mask & 31);
  if (mode == 'u') from = own - operand;
  if (mode == 'd') from = own + operand;
  if (mode == 'b') from = own ^ operand;
  const bool inside = mode == 'u' ? from >= limit : from <= limit;
  const auto values = gather(mask, value.bits, site);
  if (inside && !(mask.bits >> from & 1))
    fail(std::string("a shuffle reads a lane outside of the mask at ") + site);
  return {values[inside ? from : own], inside};
}

// PTX ISA, mma.m16n8k16, with g = lane / 4 and t = lane % 4. The registers hold
// A: columns 2t and 2t + 1 of rows g and g + 8, then columns 2t + 8 and 2t + 9 of the same rows
// B: rows 2t and 2t + 1 of column g, then rows 2t + 8 and 2t + 9
// C and D: columns 2t and 2t + 1 of rows g and g + 8
std::array<f32, 4> multiply(bool is_bf16, const Any (&a)[4], const Any (&b)[2],
                            const Any (&c)[4], const char* site) {
  struct Slot {
    const Any (&a)[4];
    const Any (&b)[2];
    std::array<f32, 4> d;
  } mine{.a = a, .b = b, .d = {}};
  for (int i = 0; i < 4; ++i) mine.d[i] = as<f32>(c[i]);
  meet_lanes(~0u, site, mine, [is_bf16](Slot** slots, u32) {
    ++counts.mma;
    float whole_a[16][16];
    float whole_b[16][8];
    const auto element = [&](u64 bits) {
      return is_bf16 ? float(as<bf16>(bits)) : float(as<f16>(bits));
    };
    for (int i = 0; i < 64; ++i) {
      const int lane = i / 2;
      const int half = i % 2;
      const int g = lane / 4;
      const int k = lane % 4 * 2 + half;
      for (int r = 0; r < 4; ++r)
        whole_a[g + r % 2 * 8][k + r / 2 * 8] = element(slots[lane]->a[r].bits >> half * 16);
      for (int r = 0; r < 2; ++r)
        whole_b[k + r * 8][g] = element(slots[lane]->b[r].bits >> half * 16);
    }
    for (int i = 0; i < 128; ++i) {
      const int lane = i / 4;
      const int r = i % 4;
      const int row = lane / 4 + r / 2 * 8;
      const int column = lane % 4 * 2 + r % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += whole_a[row][k] * whole_b[k][column];
      slots[lane]->d[r] += sum;
    }
  });
  return mine.d;
}

// PTX ISA, ldmatrix: lane 8m + i has row i of matrix m, and each lane gets columns lane % 4 * 2
// and the next of row lane / 4.
void distribute_matrices(int count, bool transposed, u64 address, const u16* row, u32* out,
                         const char* site) {
  struct Slot {
    u64 address;
    const u16* row;
    u32* out;
  } mine{.address = address, .row = row, .out = out};
  meet_lanes(~0u, site, mine, [=](Slot** slots, u32) {
    for (int m = 0; m < count; ++m) {
      Slot** const rows = slots + 8 * m;
      int hits[8] = {};  // of each group of four banks
      int worst = 0;
      for (int i = 0; i < 8; ++i) worst = std::max(worst, ++hits[rows[i]->address / 16 % 8]);
      counts.conflicts += worst - 1;
      ++counts.matrices;
      const auto element = [&](int i, int j) {
        return u32(transposed ? rows[j]->row[i] : rows[i]->row[j]);
      };
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4;
        const int j = lane % 4 * 2;
        slots[lane]->out[m] = element(i, j) | element(i, j + 1) << 16;
      }
    }
  });
}

}  // namespace emulator
