// A wgmma product in which every layout is NVIDIA's own: CuTe chooses the swizzles, the
// descriptors and the layout of the sums.
#include <cute/tensor.hpp>

using namespace cute;

// c (64, 128) = a (64, 64) · b (128, 64)ᵀ by a warpgroup. MAJOR says whether b's tile in shared
// memory has rows of k, or is transposed.
template <GMMA::Major MAJOR, class Tile>
static __global__ void __launch_bounds__(128)
    product_kernel(const bfloat16_t* a, const bfloat16_t* b, float* c) {
  __shared__ alignas(1024) bfloat16_t tile_a[64 * 64];
  __shared__ alignas(1024) bfloat16_t tile_b[128 * 64];
  using TileA =
      decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<bfloat16_t>{}, Shape<_64, _64>{}));
  Tensor sa = make_tensor(make_smem_ptr(tile_a), TileA{});
  Tensor sb = make_tensor(make_smem_ptr(tile_b), Tile{});
  for (int i = threadIdx.x; i < 64 * 64; i += 128) sa(i / 64, i % 64) = a[i];
  for (int i = threadIdx.x; i < 128 * 64; i += 128) sb(i / 64, i % 64) = b[i];
  tma_store_fence();  // fence.proxy.async for the stores to shared memory
  __syncthreads();
  auto mma = make_tiled_mma(SM90_64x128x16_F32BF16BF16_SS<GMMA::Major::K, MAJOR>{});
  auto mma_slice = mma.get_slice(threadIdx.x);
  Tensor ra = mma_slice.make_fragment_A(mma_slice.partition_A(sa));
  Tensor rb = mma_slice.make_fragment_B(mma_slice.partition_B(sb));
  Tensor gc =
      make_tensor(make_gmem_ptr(c), make_layout(Shape<_64, _128>{}, Stride<_128, _1>{}));
  Tensor rc = mma_slice.partition_fragment_C(gc);
  clear(rc);
  warpgroup_fence_operand(rc);
  warpgroup_arrive();
  gemm(mma, ra, rb, rc);
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  warpgroup_fence_operand(rc);
  copy(rc, mma_slice.partition_C(gc));
}

extern "C" int ask(const char*, uintptr_t c, uintptr_t a, uintptr_t b, int transposed, int,
                   int) {
  using Rows =
      decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<bfloat16_t>{}, Shape<_128, _64>{}));
  using Columns =
      decltype(tile_to_shape(GMMA::Layout_MN_SW128_Atom<bfloat16_t>{}, Shape<_128, _64>{}));
  const auto kernel = transposed ? product_kernel<GMMA::Major::MN, Columns>
                                 : product_kernel<GMMA::Major::K, Rows>;
  kernel<<<1, 128>>>(reinterpret_cast<const bfloat16_t*>(a),
                     reinterpret_cast<const bfloat16_t*>(b), reinterpret_cast<float*>(c));
  return cudaGetLastError();
}
