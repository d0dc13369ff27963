// The product of rows of x with a base, dense or of 4 bits, plus LoRA's part. Arithmetic is
// fp32, whatever dtype is stored. LoRA's sums are made first, and the base's are added to them.
#pragma once
#include "vec.h"

namespace peftops::ISA {

// out = gain ⊙ (y0 + x·w + s · mask ⊙ (h·b)) + bias; z = what gain multiplies.
//
// Forward w (k, n) and b (r, n) are the transposes of the base and of LoRA's b. Backward they
// are the base and LoRA's a as they are. What may be absent has no data or is null.
struct Product {
  Tensor out;           // (m, n)
  Tensor z;             // (m, n), or absent
  Tensor x;             // (m, k), or absent: then there is no x·w
  Tensor y0;            // (m, n), or absent
  const float* h;       // (m, r)
  int64_t m, n, k, r;   // of this product, not of the layer
  float s;              // LoRA's scale
  const uint8_t* bits;  // the mask (m, mask_bytes(n)), or null
  const float* gain;    // (n,), or null
  const float* bias;    // (n,), or null
  Tensors base;
  Form form;              // of the base
  int64_t block;          // elements that share a scale of a 4-bit base
  Tensor delta;           // LoRA's b (n, r), or backward its a (r, n)
  bool backward;          // see above
  const float* row_gain;  // (k,) multiplies the rows of w, or null
};
void product(const Product& t);

namespace {

// (m, columns) = h if there is no gate, else h once for each expert, times the expert's gate
// and rounded to T. scratch: memory for the result
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
