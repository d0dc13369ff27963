// A 4-bit weight: two codes a byte, high half first, and a scale for each block, which may have
// a code of its own.
#pragma once
#include "tile.cuh"

namespace peftops::cuda {

struct Nf4 {
  const uint8_t* codes;
  const float* table;  // of sixteen
  const void* absmax;  // fp32, or where there is `nested`, codes of 8 bits
  const float *nested, *nested_table, *offset;
  int shift;  // a block is 1 << shift elements
};

namespace {

constexpr int NESTED = 256;  // scales that share a scale

inline Nf4 nf4_of(Tensor codes, Tensor table, Tensor absmax, Tensor nested, Tensor nested_table,
                  Tensor offset, int64_t block) {
  int shift = 0;
  while (block >> shift > 1) ++shift;
  auto floats = [](Tensor t) { return static_cast<const float*>(t.data); };
  return {static_cast<const uint8_t*>(codes.data),
          floats(table),
          absmax.data,
          floats(nested),
          floats(nested_table),
          floats(offset),
          shift};
}

// What is loaded for a scale, long before it is needed
struct Scale {
  float value;
  int code;
};

DEVICE Scale load_scale(const Nf4& w, uint64_t element) {
  const uint64_t block = element >> w.shift;
  if (!w.nested) return {__ldg(static_cast<const float*>(w.absmax) + block), 0};
  return {__ldg(w.nested + block / NESTED),
          __ldg(static_cast<const uint8_t*>(w.absmax) + block)};
}

// absmax, with two roundings as bitsandbytes has them
DEVICE float absmax_of(const Nf4& w, const Scale& scale, const float* nested_table,
                       float offset) {
  return w.nested ? __fadd_rn(__fmul_rn(nested_table[scale.code], scale.value), offset)
                  : scale.value;
}

}  // namespace
}  // namespace peftops::cuda
