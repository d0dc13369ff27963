// Quantizes weights to 4 bits, and dequantizes them or parts of them. Threads take whole blocks
// or runs of elements.
#include "nf4.h"

#include "ops.h"

namespace peftops::ISA {
namespace {

// The code of x is order[number of bounds below x / absmax]. A block begins at a whole byte.
template <class T>
void quantize(Tensor codes, Tensor absmax, Tensor w, Tensor bounds, Tensor order,
              int64_t block) {
  const int64_t size = w.shape[0] * w.shape[1], blocks = ceil_div(size, block);
  const float* bound = as<float>(bounds);
  const uint8_t* code = as<uint8_t>(order);
#pragma omp parallel for num_threads(threads_for(20 * size)) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t count = min(block, size - b * block);
    const T* from = as<T>(w) + b * block;
    float x[4096 + 1], most = 0;
    int32_t index[4096 + 1];
    for (int64_t i = 0; i < count; ++i) {
      x[i] = widen(from[i]);
      const float magnitude = __builtin_fabsf(x[i]);
      most = magnitude > most || magnitude != magnitude ? magnitude : most;
    }
    as<float>(absmax)[b] = most;
    const float inverse = 1.0f / (most > 1e-38f ? most : 1e-38f);
    x[count] = 0;  // shares a byte with the last element if their number is odd
    for (int64_t i = 0; i <= count; ++i) {
      const float normal = x[i] * inverse;
      int32_t below = 0;
      for (int j = 0; j < 15; ++j) below += normal > bound[j];
      index[i] = below;
    }
    uint8_t* to = as<uint8_t>(codes) + b * block / 2;
    for (int64_t i = 0; i < count; i += 2)
      to[i / 2] = uint8_t(code[index[i]] << 4 | code[index[i + 1]]);
  }
}

constexpr int64_t RUN = 16384;  // elements that one thread decodes at once

}  // namespace

void nf4_quantize(Tensor codes, Tensor absmax, Tensor w, Tensor bounds, Tensor order,
                  int64_t block) {
  with_type(w.dtype,
            [&](auto e) { quantize<decltype(e)>(codes, absmax, w, bounds, order, block); });
}

void nf4_dequantize(Tensor out, Tensors base, int64_t block) {
  const NF4 w(base, block);
  const int64_t size = out.shape[0] * out.shape[1];
  with_type(out.dtype, [&](auto e) {
#pragma omp parallel for num_threads(threads_for(size)) schedule(static)
    for (int64_t at = 0; at < size; at += RUN)
      decode(w, at, min(RUN, size - at), as<decltype(e)>(out) + at);
  });
}

void nf4_part(Tensor out, Tensors base, int64_t block, int64_t k, int64_t row, int64_t column) {
  const NF4 w(base, block);
  const int64_t rows = out.shape[0], columns = out.shape[1];
  with_type(out.dtype, [&](auto e) {
#pragma omp parallel for num_threads(threads_for(rows* columns)) schedule(static)
    for (int64_t i = 0; i < rows; ++i)
      decode(w, (row + i) * k + column, columns, as<decltype(e)>(out) + i * columns);
  });
}

}  // namespace peftops::ISA
