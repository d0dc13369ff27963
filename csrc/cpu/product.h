// The product of rows of x with a base, dense or of 4 bits, plus LoRA's part. Arithmetic is
// fp32, whatever dtype is stored. LoRA's sums are made first, and the base's are added to them.
#pragma once
#include "vec.h"

namespace peftops::ISA {

// What rows of one slot of multi-LoRA are multiplied with.
struct Adapter {
  int64_t first;      // its first rank-row among those of all adapters
  int64_t r;          // its rank
  float s;            // its scale
  const float* gain;  // (n,), or null
};

// Which adapter each row of a product has.
struct Routes {
  const int32_t* slots;     // (m,)
  const Adapter* adapters;  // of slots; adapters[-1] is that of the base alone
  const int64_t* lines;     // (r,) the row of `delta` that is each rank-row
  int64_t ldh;              // from row to row of h
};

// out = gain ⊙ (y0 + x·w + s · mask ⊙ (h·b)) + bias; z = what gain multiplies.
//
// Forward w (k, n) and b (r, n) are the transposes of the base and of LoRA's b. Backward they
// are the base and LoRA's a as they are. What may be absent has no data or is null.
struct Product {
  Tensor out;           // (m, n)
  Tensor z;             // (m, n), or absent
  Tensor x;             // (m, k), or absent: then there is no x·w
  Tensor y0;            // (m, n), in fp32 or x's dtype, or absent
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
  // Of multi-LoRA, or null. With routes r counts the rank-rows of all adapters, delta is a pool
  // of rank-rows (R, n), s and gain are not used, and a row of h begins with what its own
  // adapter has.
  const Routes* routes;
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
