// Quantizes a weight to 4 bits, and dequantizes a weight or a part of one. Both are one pass
// that is limited by memory, so that loads and stores are as wide as possible.
#include "nf4.cuh"
#include "ops.h"

namespace peftops::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int DEPTH = 4;   // times eight elements that a thread decodes; it loads all at once
constexpr int WARP = 256;  // elements that a warp encodes at a time

struct Quantize {
  uint8_t* codes;        // out (⌈size / 2⌉,)
  float* absmax;         // out (⌈size / block⌉,)
  const void* w;         // (size,) of T
  const float* bounds;   // (15,): the values between which the code changes, ascending
  const uint8_t* order;  // (16,): the code for each number of bounds below a value
  int64_t size;          // elements
  int block;             // elements that share an absmax
};

// Eight elements as floats. Elements past the last one are zero.
template <class T>
DEVICE void load_eight(float (&out)[8], const T* w, int64_t at, int64_t size) {
  if (at + 8 <= size) return widen(out, load(w + at));
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = at + i < size ? widen(w[at + i]) : 0.0f;
}

// A warp takes a block, or 256 elements if blocks are smaller. It finds the largest magnitudes
// first and reads the elements again to encode them.
// limits: registers 16-96, shared 16-128, wide 1-
template <class T>
__global__ void __launch_bounds__(THREADS) nf4_quantize_kernel(Quantize q) {
  __shared__ uint8_t s_order[16];
  const int lane = threadIdx.x % 32;
  const int step = max(q.block, WARP);     // elements of a warp
  const int lanes = min(32, q.block / 8);  // that share a block
  if (threadIdx.x < 16) s_order[threadIdx.x] = q.order[threadIdx.x];
  float r_bounds[15];
#pragma unroll
  for (int i = 0; i < 15; ++i) r_bounds[i] = q.bounds[i];
  __syncthreads();
  const int64_t first = (int64_t(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32) * step;
  if (first >= q.size) return;
  const T* w = static_cast<const T*>(q.w);
  const int64_t end = min(first + step, q.size);

  uint32_t most = 0;  // the bits of the largest magnitude; NaN's bits are larger than any other
#pragma unroll 1
  for (int64_t at = first + lane * 8; at < end; at += WARP) {
    float v[8];
    load_eight(v, w, at, q.size);
#pragma unroll
    for (int i = 0; i < 8; ++i) most = max(most, __float_as_uint(v[i]) & 0x7fffffff);
  }
#pragma unroll 1
  for (int o = 1; o < lanes; o *= 2) most = max(most, __shfl_xor_sync(~0u, most, o));
  const float absmax = __uint_as_float(most);
  const float inverse = __frcp_rn(absmax < 1e-38f ? 1e-38f : absmax);
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
  void* out;        // (rows, columns) of T
  int64_t first;    // the element of w that becomes the first of out
  int64_t k;        // elements of w from a row to the next
  int64_t size;     // elements of out
  int64_t columns;  // of out, or `size` if its rows follow one another in w too
  bool aligned;     // every eight elements of out are a whole 32-bit word of codes
};

// A part of w (n, k). The words of codes that a thread reads are 1 KiB of codes apart, so that
// the stores of a warp are contiguous: they are five times as large as its loads.
// limits: registers 16-64, shared 1024-1152
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
      if (d.columns < d.size) {
        // Divides eights in 32 bits, which takes a tenth of the time of 64 bits.
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

// codes, absmax: outputs; w: `size` elements; bounds (15,), order (16,): see Quantize.
extern "C" int nf4_quantize(peftops::Tensor codes, peftops::Tensor absmax, peftops::Tensor w,
                            peftops::Tensor bounds, peftops::Tensor order, int64_t size,
                            int64_t block, uintptr_t stream) {
  using namespace peftops::cuda;
  Quantize q{};
  q.codes = static_cast<uint8_t*>(codes.data);
  q.absmax = static_cast<float*>(absmax.data);
  q.w = w.data;
  q.bounds = static_cast<const float*>(bounds.data);
  q.order = static_cast<const uint8_t*>(order.data);
  q.size = size;
  q.block = int(block);
  // Elements that a thread block encodes.
  const int64_t each = (block > WARP ? block : WARP) * (THREADS / 32);
  return with_type(w.dtype, [&](auto t) {
    return launch(nf4_quantize_kernel<decltype(t)>, dim3((size + each - 1) / each), THREADS, 0,
                  stream, false, q);
  });
}

// out (rows, columns) = the part of the weight (n, k) that begins at the element `first`.
extern "C" int nf4_dequantize(peftops::Tensor out, peftops::Tensor codes, peftops::Tensor table,
                              peftops::Tensor absmax, peftops::Tensor nested,
                              peftops::Tensor nested_table, peftops::Tensor offset,
                              int64_t block, int64_t k, int64_t first, int64_t rows,
                              int64_t columns, uintptr_t stream) {
  using namespace peftops::cuda;
  const int64_t size = rows * columns;
  const int64_t each = THREADS * DEPTH * 8;     // elements that a thread block makes
  const bool flat = rows == 1 || columns == k;  // rows of out follow one another in w too
  Dequantize d{};
  d.w = nf4_of(codes, table, absmax, nested, nested_table, offset, block);
  d.out = out.data;
  d.first = first;
  d.k = k;
  d.size = size;
  d.columns = flat ? size : columns;
  d.aligned = first % 8 == 0 && (flat || (k % 8 == 0 && columns % 8 == 0));
  return with_type(out.dtype, [&](auto t) {
    return launch(nf4_dequantize_kernel<decltype(t)>, dim3((size + each - 1) / each), THREADS,
                  0, stream, false, d);
  });
}
