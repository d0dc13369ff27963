// Multi-LoRA for few rows: as in lora.cu, but each row has the adapter of its slot.
//
// The first launch makes h and is overlapped by the next, which multiplies by the base and adds
// h·b by the table of the row's slot. From five rows on it is one of LoRA's. Grids depend on
// shapes alone, so that a CUDA graph serves every batch of a shape.
#include "few.cuh"
#include "lora.cuh"
#include "ops.h"

namespace peftops::cuda {
namespace {

constexpr int SHARE = 2;  // warps that share a rank-row of a
constexpr int WARPS = PAGE * SHARE, THREADS = WARPS * 32, FEW_THREADS = 256;

// Up to M rows of one slot.
template <int M>
struct Mates {
  int64_t starts[M];  // where they start in x; those past the last one repeat it
  int rows[M];
  int count;

  DEVICE int64_t operator()(int i) const { return starts[i]; }
};

// Finds the rows of `slot` from row `first` on, M of them at most. The count is 0 if a block of
// an earlier row has `first` among its own. All lanes of a warp call it.
template <int M>
DEVICE Mates<M> mates_of(const Routed& g, int first, int slot) {
  const int lane = threadIdx.x % 32;
  // One bit for each of 32 rows: whether it has the slot.
  auto alike = [&](int begin) {
    const int row = begin + lane;
    return __ballot_sync(~0u, row < g.m && g.slots[min(row, g.m - 1)] == slot);
  };
  int before = 0;  // rows of the slot before the first
#pragma unroll 1
  for (int begin = 0; begin + 32 <= first; begin += 32) before += __popc(alike(begin));
  int begin = first / 32 * 32;
  const uint32_t earlier = (1u << first % 32) - 1;
  uint32_t left = alike(begin);
  before += __popc(left & earlier);
  left &= ~earlier;
  Mates<M> mates{};
  if (before % M) return mates;
  int row = first;
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll 1
    while (!left && begin + 32 < g.m) left = alike(begin += 32);
    if (left) row = begin + __clz(__brev(left));
    mates.rows[i] = row;
    mates.starts[i] = int64_t(row) * g.k;
    mates.count += left != 0;
    left &= left - 1;
  }
  return mates;
}

// h = x·a[slot]ᵀ, rounded to T. A block makes one page of ranks, of up to M rows of one slot.
// limits: registers 24-128, shared 68-272, wide 3-, fma 8-
template <int M, class T, class A>
__global__ void __launch_bounds__(THREADS, M == 1 ? 2 : 1) multi_rank_kernel(Routed g) {
  __shared__ float s_sums[WARPS][M];
  __shared__ int s_rows[M];
  allow_launch_behind();
  const int tid = threadIdx.x, warp = tid / 32, page = blockIdx.y;
  const int slot = g.slots[blockIdx.x];
  if (slot < 0) return;
  const int ranks = min(PAGE, g.rank[slot] - page * PAGE);
  if (ranks <= 0) return;
  const Mates<M> mates = mates_of<M>(g, blockIdx.x, slot);
  if (!mates.count) return;
  if (const int j = warp / SHARE; j < ranks) {
    const int64_t first = int64_t(g.table[int64_t(slot) * g.pages + page]) * PAGE;
    float sums[M] = {};
    dots_of_any_length(sums, static_cast<const A*>(g.a) + (first + j) * g.k,
                       static_cast<const T*>(g.x), mates, g.k, tid % (32 * SHARE), 32 * SHARE);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const float sum = warp_sum(sums[i]);
      if (tid % 32 == 0) s_sums[warp][i] = sum;
    }
  }
  if (tid == 0)
#pragma unroll
    for (int i = 0; i < M; ++i) s_rows[i] = mates.rows[i];
  __syncthreads();
  const int i = tid / PAGE, j = tid % PAGE;
  if (i >= mates.count || j >= ranks) return;
  float sum = 0;
#pragma unroll
  for (int part = 0; part < SHARE; ++part) sum += s_sums[j * SHARE + part][i];
  g.h[int64_t(s_rows[i]) * g.r + page * PAGE + j] = rounded<T>(sum);
}

struct Few : Routed {
  int shift;  // 1 << shift warps share a row of w
};

// One to four rows on a base of 16 or 32 bits. A warp multiplies x with a part of a row of w.
// limits: registers 24-128, shared 32-128, wide 8-, fma 16-
template <int M, class T>
__global__ void __launch_bounds__(FEW_THREADS, M == 1 ? 4 : 2) multi_few_kernel(Few g) {
  __shared__ float s_sums[FEW_THREADS / 32][M];
  const int tid = threadIdx.x, warp = tid / 32;
  const int span = FEW_THREADS / 32 >> g.shift;  // columns of y that a block makes
  const int n0 = blockIdx.x * span, columns = min(span, g.n - n0);
  prefetch_b<T>(g, 0, g.m, n0, columns);
  if (const int column = warp >> g.shift; column < columns) {
    const int begin = tid % (32 << g.shift) * 8;
    float sums[M] = {};
    dots(sums, static_cast<const T*>(g.w) + int64_t(n0 + column) * g.k,
         static_cast<const T*>(g.x), Below{g.m - 1, g.k}, g.k, begin, 256 << g.shift);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const float sum = warp_sum(sums[i]);
      if (tid % 32 == 0) s_sums[warp][i] = sum;
    }
  }
  __syncthreads();
  if (!g.inside) wait_for_launch_before();
  const int row = tid / columns, column = tid % columns;
  if (row >= g.m) return;
  float sum = 0;
#pragma unroll 1
  for (int part = 0; part < 1 << g.shift; ++part)
    sum += s_sums[(column << g.shift) + part][row];
  store<T>(g, row, n0 + column, sum, g.h + int64_t(row) * g.r);
}

template <class T, class A>
int launch_rank(const Routed& g, uintptr_t stream) {
  const dim3 blocks(g.m, g.pages);
  if (g.m == 1) return launch(multi_rank_kernel<1, T, A>, blocks, THREADS, 0, stream, false, g);
  return launch(multi_rank_kernel<4, T, A>, blocks, THREADS, 0, stream, false, g);
}

// As for LoRA, several warps share a row of w if there are too few rows to keep every
// multiprocessor reading.
template <class T>
int launch_few(const Routed& g, int processors, uintptr_t stream) {
  Few f{g, 0};
  while (f.shift < 3 && int64_t(g.n) << f.shift <= 24 * processors) ++f.shift;
  const int span = FEW_THREADS / 32 >> f.shift;
  return launch(g.m == 1 ? multi_few_kernel<1, T> : multi_few_kernel<4, T>,
                dim3((g.n + span - 1) / span), FEW_THREADS, 0, stream, !g.inside, f);
}

template <class T, class A>
int gemv(const GemvNf4& g, Dtype dtype, bool given, int processors, uintptr_t stream) {
  if (!g.inside)
    if (int error = launch_rank<T, A>(g, stream)) return error;
  if (given || g.base.codes || g.m > 4)
    return launch_product(g, dtype, given, processors, stream);
  return launch_few<T>(g, processors, stream);
}

}  // namespace
}  // namespace peftops::cuda

// y_i = gain[s] ⊙ (x_i·Ŵᵀ + scale[s] · (x_i·a[s]ᵀ)·b[s]) + bias with s = slots[i]; shapes as in
// Gemv. What lies beyond a slot's rank is not read.
//   h: fp32 scratch (m, 8·pages); empty if there are no pages
//   w: Ŵ (n, k); its codes if there is a table; or y0 (m, n), which may be y, if `given`
//   codes_table, absmax, nested, nested_table, offset, block: of a 4-bit base, see Nf4; else
//     empty
//   processors: multiprocessors of the device
extern "C" int multi_gemv(peftops::Tensor y, peftops::Tensor h, peftops::Tensor x,
                          peftops::Tensor w, peftops::Tensor codes_table,
                          peftops::Tensor absmax, peftops::Tensor nested,
                          peftops::Tensor nested_table, peftops::Tensor offset,
                          peftops::Tensor a, peftops::Tensor b, peftops::Tensor slots,
                          peftops::Tensor table, peftops::Tensor rank, peftops::Tensor scale,
                          peftops::Tensor bias, peftops::Tensor gain, int64_t block, bool given,
                          int processors, uintptr_t stream) {
  using namespace peftops::cuda;
  GemvNf4 g = gemv_of(y, h, x, w, codes_table, absmax, nested, nested_table, offset, a, b,
                      scale, bias, gain, block);
  g.n = int(b.shape[1]);
  g.r = g.rb = int(h.shape[1]);
  g.slots = static_cast<int*>(slots.data);
  g.table = static_cast<int*>(table.data);
  g.rank = static_cast<int*>(rank.data);
  g.pages = int(table.shape[1]);
  return with_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    if (g.wide_a) return gemv<T, float>(g, x.dtype, given, processors, stream);
    return gemv<T, T>(g, x.dtype, given, processors, stream);
  });
}
