// The product of rows of x with a base, dense or of 4 bits, in fp32 arithmetic whatever is
// stored: LoRA's sums first.
#pragma once
#include "vec.h"

namespace peftops::ISA {

// out = gain ⊙ (y0 + x·w + s · mask ⊙ (h·b)) + bias, z = what gain multiplies; all but h, w and
// b may be absent. w (k, n) is the base transposed, or backward the base as it is; b (r, n) is
// the delta likewise.
struct Product {
  Tensor out, z, x, y0;
  const float* h;  // (m, r)
  int64_t m, n, k, r;
  float s;
  const uint8_t* bits;
  const float *gain, *bias;
  Tensors base;
  Form form;
  int64_t block;
  Tensor delta;
  bool backward;
  const float* row_gain;  // of w
};
void product(const Product& t);

namespace {

// (m, columns): h, or each expert's columns of h times its gate, rounded to T
template <class T>
const float* gated(Tensor h, Tensor gate, int64_t columns, Scratch& scratch) {
  const int64_t m = h.shape[0], r = h.shape[1];
  if (!gate.data && h.dtype == Dtype::f32) return as<float>(h);
  float* out = scratch.get<float>(pad16(m * columns));
  if (!gate.data) {
    widen_row(as<T>(h), m * r, nullptr, out);
    return out;
  }
  const int64_t experts = gate.shape[1], each = columns / experts;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const float value = widen(as<T>(h)[i * r + j % r]);
      out[i * columns + j] = rounded<T>(value * as<float>(gate)[i * experts + j / each]);
    }
  return out;
}

}  // namespace
}  // namespace peftops::ISA
