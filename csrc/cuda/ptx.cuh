// All inline PTX of the kernels: the instructions that CUDA C++ has no function for. It runs on
// sm_80 and newer.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__

namespace peftops::cuda {
namespace {

// Reads 16 bytes without keeping them in L1, since they are read only once.
DEVICE uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Starts a copy of SIZE (8 or 16) bytes to shared memory. Only the first `bytes` are read; the
// others become zero.
template <int SIZE = 16>
DEVICE void copy_async(void* shared, const void* global, int bytes) {
  if (SIZE == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last LEFT groups of copies have arrived.
template <int LEFT>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Loads four 8x8 matrices of 16-bit elements. Lane 8i + j gives the address of row j of matrix
// i.
DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a·b on tensor cores, with a (16, 16) by rows and b (16, 8) by columns.
template <class T>
DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define PEFTOPS_MULTIPLY(type, name)                                                    \
  template <>                                                                           \
  DEVICE void multiply<type>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,        \
                             uint32_t b1) {                                             \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));       \
  }
PEFTOPS_MULTIPLY(__nv_bfloat16, "bf16")
PEFTOPS_MULTIPLY(__half, "f16")
#undef PEFTOPS_MULTIPLY

// Lets the next launch start now, if it was launched to overlap this one.
DEVICE void allow_launch_behind() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Waits until the launch before this one has finished, if this one overlaps it.
DEVICE void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace
}  // namespace peftops::cuda
