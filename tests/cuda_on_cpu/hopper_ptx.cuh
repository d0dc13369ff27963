// Hopper's instructions as the tests of the emulator use them.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ptx.cuh"

namespace peftops::cuda {
namespace {

DEVICE void init(uint64_t& bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&bar)), "r"(count)
               : "memory");
}
DEVICE void inval(uint64_t& bar) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(&bar)) : "memory");
}
DEVICE void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(uint64_t& bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&bar))
               : "memory");
}
DEVICE void expect(uint64_t& bar, int bytes) {  // and arrive
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&bar)),
      "r"(bytes)
      : "memory");
}
DEVICE bool test(uint64_t& bar, int parity) {
  int passed;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, "
      "0, p; }"
      : "=r"(passed)
      : "r"(shared_address(&bar)), "r"(parity)
      : "memory");
  return passed;
}
DEVICE void wait(uint64_t& bar, int parity) {
  for (int passed = 0; !passed;)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, "
        "0, p; }"
        : "=r"(passed)
        : "r"(shared_address(&bar)), "r"(parity)
        : "memory");
}
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void fetch(void* to, const CUtensorMap& map, int column, int row, uint64_t& bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&bar)), "r"(column), "r"(row)
      : "memory");
}
DEVICE void send(const CUtensorMap& map, int column, int row, const void* from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
      "r"(shared_address(from)), "r"(column), "r"(row)
      : "memory");
}
DEVICE void commit_tiles() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
DEVICE void wait_tiles_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

template <int ID>
DEVICE void meet(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(ID), "r"(threads) : "memory");
}
template <int ID>
DEVICE void leave(int threads) {
  asm volatile("bar.arrive %0, %1;" ::"n"(ID), "r"(threads) : "memory");
}

// Of 128-byte rows that are swizzled, eight by eight; `leading` and `stride` in bytes
DEVICE uint64_t descriptor(const void* tile, int leading, int stride, int swizzle = 1) {
  return uint64_t(shared_address(tile) & 0x3ffff) >> 4 | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t(swizzle) << 62;
}
DEVICE void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

#define SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS \
  SUMS4(0), SUMS4(4), SUMS4(8), SUMS4(12), SUMS4(16), SUMS4(20), SUMS4(24), SUMS4(28), SUMS4(32)
#define REGISTERS                                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, "                                                                        \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35}"
// d (64, 72) (+)= a (64, 16) · b (16, 72)
template <class T, bool TURNED_A, bool TURNED_B>
DEVICE void multiply(float (&d)[36], uint64_t a, uint64_t b, int add);
#define MULTIPLY(type, name, turned_a, turned_b)                                         \
  template <>                                                                            \
  DEVICE void multiply<type, turned_a, turned_b>(float (&d)[36], uint64_t a, uint64_t b, \
                                                 int add) {                              \
    asm volatile(                                                                        \
        "{ .reg .pred p; setp.ne.b32 p, %38, 0; "                                        \
        "wgmma.mma_async.sync.aligned.m64n72k16.f32." name "." name " " REGISTERS        \
        ", %36, %37, p, 1, 1, %39, %40; }"                                               \
        : SUMS                                                                           \
        : "l"(a), "l"(b), "r"(add), "n"(turned_a), "n"(turned_b));                       \
  }
MULTIPLY(__nv_bfloat16, "bf16", false, false)
MULTIPLY(__nv_bfloat16, "bf16", false, true)
MULTIPLY(__nv_bfloat16, "bf16", true, false)
MULTIPLY(__half, "f16", false, false)
#undef MULTIPLY
DEVICE void multiply_held(float (&d)[36], const uint32_t (&a)[4], uint64_t b, int add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %41, 0; "
      "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 " REGISTERS
      ", {%36, %37, %38, %39}, %40, p, 1, 1, 0; }"
      : SUMS
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
#undef SUMS4
#undef SUMS
#undef REGISTERS

}  // namespace

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                            const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                            const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
struct Matrix {
  CUtensorMapDataType type;
  uint64_t rows, columns, pitch;  // pitch in bytes
  uint32_t height, width;         // of a box
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  uint32_t rank = 2;
};
inline int encode(CUtensorMap& map, const void* base, const Matrix& m) {  // 0, or an error
  void* found = nullptr;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault);
  const cuuint64_t size[] = {m.columns, m.rows}, pitch[] = {m.pitch};
  const cuuint32_t box[] = {m.width, m.height}, step[] = {1, 1};
  return reinterpret_cast<Encode>(found)(&map, m.type, m.rank, const_cast<void*>(base), size,
                                         pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                         m.swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// hopper_product.cu: c (150, 136) = a (150, 200) · bᵀ, or, turned, · b, of bfloat16; `mistake`
// 1 makes none
int hopper_product(float* c, const void* a, const void* b, bool turned, int mistake,
                   int blocks);

}  // namespace peftops::cuda
