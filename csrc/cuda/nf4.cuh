// A 4-bit weight as bitsandbytes stores it: two codes a byte, the first in the high half, and a
// scale (absmax) for each block of elements. Scales may themselves be stored as 8-bit codes.
#pragma once
#include "tile.cuh"

namespace peftops::cuda {

struct Nf4 {
  const uint8_t* codes;       // (n·k / 2,); null: there is no 4-bit weight
  const float* table;         // (16,): the value of each code
  const void* absmax;         // (blocks,) fp32, or 8-bit codes if there is `nested`
  const float* nested;        // (blocks / 256,): scales of the scales, or null
  const float* nested_table;  // (256,): the value of each 8-bit code
  const float* offset;        // (1,): is added to each scale
  int shift;                  // a block is 1 << shift elements
};

namespace {

constexpr int NESTED = 256;  // scales that share a scale, and 8-bit codes

inline Nf4 nf4_of(Tensor codes, Tensor table, Tensor absmax, Tensor nested, Tensor nested_table,
                  Tensor offset, int64_t block) {
  int shift = 0;
  while (block >> shift > 1) ++shift;
  auto floats = [](Tensor t) { return static_cast<const float*>(t.data); };
  Nf4 w{};
  w.codes = static_cast<const uint8_t*>(codes.data);
  w.table = floats(table);
  w.absmax = absmax.data;
  w.nested = floats(nested);
  w.nested_table = floats(nested_table);
  w.offset = floats(offset);
  w.shift = shift;
  return w;
}

// What is loaded of a block's scale, long before the scale is needed.
struct Scale {
  float value;  // absmax, or the scale of the scale if there is `nested`
  int code;     // of 8 bits if there is `nested`
};

// element: its index in the weight
DEVICE Scale load_scale(const Nf4& w, uint64_t element) {
  const uint64_t block = element >> w.shift;
  if (!w.nested) return {__ldg(static_cast<const float*>(w.absmax) + block), 0};
  return {__ldg(w.nested + block / NESTED),
          __ldg(static_cast<const uint8_t*>(w.absmax) + block)};
}

// The block's absmax. A nested one is rounded twice, as by bitsandbytes.
//   nested_table: the weight's, in shared memory
//   offset: the weight's
DEVICE float absmax_of(const Nf4& w, const Scale& scale, const float* nested_table,
                       float offset) {
  return w.nested ? __fadd_rn(__fmul_rn(nested_table[scale.code], scale.value), offset)
                  : scale.value;
}

}  // namespace
}  // namespace peftops::cuda
