// Hopper's instructions, for the kernels that test the emulator.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ptx.cuh"

namespace peftops::cuda {
namespace {

DEVICE void init(uint64_t& barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(count)
               : "memory");
}
DEVICE void inval(uint64_t& barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}
DEVICE void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}
// Also arrives.
DEVICE void expect(uint64_t& barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}
// Whether the phase of this parity is over.
DEVICE bool test(uint64_t& barrier, int parity) {
  int passed;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, "
      "0, p; }"
      : "=r"(passed)
      : "r"(shared_address(&barrier)), "r"(parity)
      : "memory");
  return passed;
}
// Waits until the phase of this parity is over.
DEVICE void wait(uint64_t& barrier, int parity) {
  for (int passed = 0; !passed;)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, "
        "0, p; }"
        : "=r"(passed)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
}
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A box from global to shared memory.
DEVICE void fetch(void* to, const CUtensorMap& map, int column, int row, uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row)
      : "memory");
}
// A box from shared to global memory.
DEVICE void send(const CUtensorMap& map, int column, int row, const void* from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
      "r"(shared_address(from)), "r"(column), "r"(row)
      : "memory");
}
DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until the stores have read shared memory.
DEVICE void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Waits at a barrier until this many threads have come or left.
template <int ID>
DEVICE void meet(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(ID), "r"(threads) : "memory");
}
// Comes to a barrier without waiting.
template <int ID>
DEVICE void leave(int threads) {
  asm volatile("bar.arrive %0, %1;" ::"n"(ID), "r"(threads) : "memory");
}

// A tile of 128-byte rows, for wgmma. leading, stride: in bytes; swizzle 1: 128 bytes
DEVICE uint64_t descriptor(const void* tile, int leading, int stride, int swizzle = 1) {
  return uint64_t(shared_address(tile) & 0x3ffff) >> 4 | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t(swizzle) << 62;
}
DEVICE void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS_LEFT>
DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS_LEFT) : "memory");
}

#define SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS \
  SUMS4(0), SUMS4(4), SUMS4(8), SUMS4(12), SUMS4(16), SUMS4(20), SUMS4(24), SUMS4(28), SUMS4(32)
#define REGISTERS                                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, "                                                                        \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35}"
// d (64, 72) = a (64, 16) · b (16, 72), plus d if `accumulates`. a, b: descriptors
template <class T, bool TRANSPOSED_A, bool TRANSPOSED_B>
DEVICE void multiply(float (&d)[36], uint64_t a, uint64_t b, int accumulates);
#define MULTIPLY(type, name, transposed_a, transposed_b)                                \
  template <>                                                                           \
  DEVICE void multiply<type, transposed_a, transposed_b>(float (&d)[36], uint64_t a,    \
                                                         uint64_t b, int accumulates) { \
    asm volatile(                                                                       \
        "{ .reg .pred p; setp.ne.b32 p, %38, 0; "                                       \
        "wgmma.mma_async.sync.aligned.m64n72k16.f32." name "." name " " REGISTERS       \
        ", %36, %37, p, 1, 1, %39, %40; }"                                              \
        : SUMS                                                                          \
        : "l"(a), "l"(b), "r"(accumulates), "n"(transposed_a), "n"(transposed_b));      \
  }
MULTIPLY(__nv_bfloat16, "bf16", false, false)
MULTIPLY(__nv_bfloat16, "bf16", false, true)
MULTIPLY(__nv_bfloat16, "bf16", true, false)
MULTIPLY(__half, "f16", false, false)
#undef MULTIPLY
// The same with a in registers.
DEVICE void multiply_registers(float (&d)[36], const uint32_t (&a)[4], uint64_t b,
                               int accumulates) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %41, 0; "
      "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 " REGISTERS
      ", {%36, %37, %38, %39}, %40, p, 1, 1, 0; }"
      : SUMS
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulates));
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
  uint64_t rows;
  uint64_t columns;
  uint64_t row_pitch;  // in bytes
  uint32_t box_rows;
  uint32_t box_columns;
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  uint32_t rank = 2;
};
// Makes a tensor map of a matrix. Returns 0 or an error.
inline int encode(CUtensorMap& map, const void* base, const Matrix& matrix) {
  void* function = nullptr;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                   cudaEnableDefault);
  const cuuint64_t size[] = {matrix.columns, matrix.rows};
  const cuuint64_t pitch[] = {matrix.row_pitch};
  const cuuint32_t box[] = {matrix.box_columns, matrix.box_rows};
  const cuuint32_t step[] = {1, 1};
  return reinterpret_cast<Encode>(function)(
      &map, matrix.type, matrix.rank, const_cast<void*>(base), size, pitch, box, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE, matrix.swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// hopper_product.cu: c (150, 136) = a (150, 200) · bᵀ of bfloat16, where b is (136, 200), or
// (200, 136) if `transposed`. mistake 1 means none
int hopper_product(float* c, const void* a, const void* b, bool transposed, int mistake,
                   int blocks);

}  // namespace peftops::cuda
