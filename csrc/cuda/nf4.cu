// 4-bit weights: one pass that makes codes of a weight, and one that makes a weight, or a part
// of it, of codes.
#include "nf4.cuh"
#include "ops.h"

namespace peftops::cuda {
namespace {

constexpr int THREADS = 256,
              DEPTH =
                  4;  // eights of elements that a thread decodes, all of them loaded at once
constexpr int WARP = 256;  // elements that a warp encodes at a time

struct Quantize {
  uint8_t* codes;
  float* absmax;
  const void* w;
  const float* bounds;
  const uint8_t* order;
  int64_t size;
  int block;
};

// Elements as floats; past the last they are zero
template <class T>
DEVICE void load_eight(float (&out)[8], const T* w, int64_t at, int64_t size) {
  if (at + 8 <= size) return widen(out, load(w + at));
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = at + i < size ? widen(w[at + i]) : 0.0f;
}

// A warp for each block, or for 256 elements of smaller blocks: their largest magnitudes, then
// their codes. limits: registers 16-96, shared 16-128, wide 1-
template <class T>
__global__ void __launch_bounds__(THREADS) nf4_quantize_kernel(Quantize q) {
  __shared__ uint8_t s_order[16];
  const int lane = threadIdx.x % 32, step = max(q.block, WARP), lanes = min(32, q.block / 8);
  if (threadIdx.x < 16) s_order[threadIdx.x] = q.order[threadIdx.x];
  float r_bounds[15];
#pragma unroll
  for (int i = 0; i < 15; ++i) r_bounds[i] = q.bounds[i];
  __syncthreads();
  const int64_t first = (int64_t(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32) * step;
  if (first >= q.size) return;
  const T* w = static_cast<const T*>(q.w);
  const int64_t end = min(first + step, q.size);

  uint32_t most = 0;  // the bits of a magnitude, of which those of NaN are the largest
#pragma unroll 1
  for (int64_t at = first + lane * 8; at < end; at += WARP) {
    float v[8];
    load_eight(v, w, at, q.size);
#pragma unroll
    for (int i = 0; i < 8; ++i) most = max(most, __float_as_uint(v[i]) & 0x7fffffff);
  }
#pragma unroll 1
  for (int o = 1; o < lanes; o *= 2) most = max(most, __shfl_xor_sync(~0u, most, o));
  const float absmax = __uint_as_float(most),
              inverse = __frcp_rn(absmax < 1e-38f ? 1e-38f : absmax);
  const int64_t own = first + lane * 8;
  if (lane % lanes == 0 && own < q.size) q.absmax[own / q.block] = absmax;

#pragma unroll 1
  for (int64_t at = own; at < end; at += WARP) {
    float v[8];
    load_eight(v, w, at, q.size);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float normal = at + i < q.size ? __fmul_rn(v[i], inverse) : 0.0f;
      int below = 0;
#pragma unroll
      for (int j = 0; j < 15; ++j) below += !(r_bounds[j] >= normal);
      word |= uint32_t(s_order[below]) << (i ^ 1) * 4;
    }
    if (at + 8 <= q.size)
      *reinterpret_cast<uint32_t*>(q.codes + at / 2) = word;
    else
      for (int i = 0; at + 2 * i < q.size; ++i) q.codes[at / 2 + i] = word >> 8 * i;
  }
}

struct Dequantize {
  Nf4 w;
  void* out;
  int64_t first, k,
      size;         // the first element, elements from a row to the next, elements of out
  int64_t columns;  // of out, or its size, where its rows follow one another in w too
  bool aligned;     // eights of out lie in w as whole words
};

// Elements of w (n, k) from the first on: a thread's words of codes are 1 KiB apart, so that
// the stores of a warp, five times as large as its loads, are one piece. limits: registers
// 16-64, shared 1024-1152
template <class T>
__global__ void __launch_bounds__(THREADS, 4) nf4_dequantize_kernel(Dequantize d) {
  __shared__ float s_table[16], s_nested[NESTED];
  const int tid = threadIdx.x;
  if (tid < 16) s_table[tid] = d.w.table[tid];
  if (d.w.nested) s_nested[tid] = d.w.nested_table[tid];
  const float offset = d.w.nested ? *d.w.offset : 0.0f;
  T* out = static_cast<T*>(d.out);
  const int64_t begin = (int64_t(blockIdx.x) * (THREADS * DEPTH) + tid) * 8;
  uint32_t r_codes[DEPTH];
  Scale r_scales[DEPTH];
  if (d.aligned) {
#pragma unroll
    for (int q = 0; q < DEPTH; ++q) {
      const int64_t o = begin + q * THREADS * 8;
      if (o + 8 > d.size) break;
      int64_t at = d.first + o;
      if (d.columns <
          d.size) {  // by 32 bits, which are enough for eights and a tenth of the time of 64
        const uint32_t row = uint32_t(o / 8) / uint32_t(d.columns / 8);
        at += row * (d.k - d.columns);
      }
      r_codes[q] = __ldg(reinterpret_cast<const uint32_t*>(d.w.codes + at / 2));
      r_scales[q] = load_scale(d.w, at);
    }
  }
  __syncthreads();
#pragma unroll
  for (int q = 0; q < DEPTH; ++q) {
    const int64_t o = begin + q * THREADS * 8;
    if (d.aligned && o + 8 <= d.size) {
      const float absmax = absmax_of(d.w, r_scales[q], s_nested, offset);
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        v[i] = __fmul_rn(s_table[r_codes[q] >> (i ^ 1) * 4 & 15], absmax);
      store_eight(out + o, v);
    } else {
#pragma unroll 1
      for (int64_t i = o; i < min(o + 8, d.size); ++i) {
        const int64_t at = d.first + i + i / d.columns * (d.k - d.columns);
        const float absmax = absmax_of(d.w, load_scale(d.w, at), s_nested, offset);
        out[i] =
            narrow<T>(__fmul_rn(s_table[d.w.codes[at / 2] >> (at & 1 ? 0 : 4) & 15], absmax));
      }
    }
  }
}

}  // namespace
}  // namespace peftops::cuda

extern "C" int nf4_quantize(peftops::Tensor codes, peftops::Tensor absmax, peftops::Tensor w,
                            peftops::Tensor bounds, peftops::Tensor order, int64_t size,
                            int64_t block, uintptr_t stream) {
  using namespace peftops::cuda;
  const Quantize q{static_cast<uint8_t*>(codes.data),
                   static_cast<float*>(absmax.data),
                   w.data,
                   static_cast<const float*>(bounds.data),
                   static_cast<const uint8_t*>(order.data),
                   size,
                   int(block)};
  const int64_t each = (block > WARP ? block : WARP) * (THREADS / 32);
  return with_type(w.dtype, [&](auto t) {
    return launch(nf4_quantize_kernel<decltype(t)>, dim3((size + each - 1) / each), THREADS, 0,
                  stream, false, q);
  });
}

// out (rows, columns) of the weight (n, k) from the element `first` on
extern "C" int nf4_dequantize(peftops::Tensor out, peftops::Tensor codes, peftops::Tensor table,
                              peftops::Tensor absmax, peftops::Tensor nested,
                              peftops::Tensor nested_table, peftops::Tensor offset,
                              int64_t block, int64_t k, int64_t first, int64_t rows,
                              int64_t columns, uintptr_t stream) {
  using namespace peftops::cuda;
  const int64_t size = rows * columns, each = THREADS * DEPTH * 8;
  const bool flat = rows == 1 || columns == k;
  const Dequantize d{nf4_of(codes, table, absmax, nested, nested_table, offset, block),
                     out.data,
                     first,
                     k,
                     size,
                     flat ? size : columns,
                     first % 8 == 0 && (flat || (k % 8 == 0 && columns % 8 == 0))};
  return with_type(out.dtype, [&](auto t) {
    return launch(nf4_dequantize_kernel<decltype(t)>, dim3((size + each - 1) / each), THREADS,
                  0, stream, false, d);
  });
}
