// What all kernels share: elements as floats, eight elements at a time, and launches.
#pragma once
#include "../tensor.h"
#include "ptx.cuh"

namespace peftops::cuda {
namespace {

DEVICE float widen(float v) { return v; }
DEVICE float widen(__half v) { return __half2float(v); }
DEVICE float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
DEVICE T narrow(float v);
template <>
DEVICE float narrow<float>(float v) {
  return v;
}
template <>
DEVICE __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
DEVICE __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <class T>
DEVICE float rounded(float v) {  // to T
  return widen(narrow<T>(v));
}

// Element i of a tensor of T, or of fp32 if `wide`.
template <class T>
DEVICE float element(const void* p, int64_t i, bool wide) {
  return wide ? static_cast<const float*>(p)[i] : widen(static_cast<const T*>(p)[i]);
}

// Two elements as they lie in memory, rounded by one instruction.
template <class T>
DEVICE uint32_t pair(float low, float high);
template <>
DEVICE uint32_t pair<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
DEVICE uint32_t pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Eight neighbouring elements that start at a multiple of 16 bytes.
template <class T>
struct Eight {
  uint4 words[sizeof(T) / 2];
};

// For what is read once: without L1.
template <class T>
DEVICE Eight<T> load_once(const T* p) {
  Eight<T> v;
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 2); ++i)
    v.words[i] = load_once(static_cast<const void*>(p + i * 16 / sizeof(T)));
  return v;
}

template <class T>
DEVICE Eight<T> load(const T* p) {
  Eight<T> v;
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 2); ++i)
    v.words[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
  return v;
}

template <class T>
DEVICE void widen(float (&out)[8], const Eight<T>& v) {
  const T* elements = reinterpret_cast<const T*>(v.words);
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = widen(elements[i]);
}
// One instruction for each element.
template <>
DEVICE void widen(float (&out)[8], const Eight<__nv_bfloat16>& v) {
  const uint32_t pairs[] = {v.words[0].x, v.words[0].y, v.words[0].z, v.words[0].w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(pairs[i] << 16);
    out[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000);
  }
}

// Eight elements rounded to T, as they lie in memory. T has 16 bits.
template <class T>
DEVICE uint4 narrow(const float (&v)[8]) {
  uint4 out;
  T* elements = reinterpret_cast<T*>(&out);
#pragma unroll
  for (int i = 0; i < 8; ++i) elements[i] = narrow<T>(v[i]);
  return out;
}

// Rounds to T and stores at an address that is a multiple of 16 bytes.
template <class T>
DEVICE void store_eight(T* p, const float (&v)[8]) {
  *reinterpret_cast<uint4*>(p) = narrow<T>(v);
}
template <>
DEVICE void store_eight(float* p, const float (&v)[8]) {
  *reinterpret_cast<float4*>(p) = *reinterpret_cast<const float4*>(v);
  *reinterpret_cast<float4*>(p + 4) = *reinterpret_cast<const float4*>(v + 4);
}

// The sum over a warp's lanes, in all of them.
DEVICE float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

// Calls f with a value of the element type that a dtype names.
template <class F>
int with_type(Dtype dtype, F f) {
  if (dtype == Dtype::f32) return f(float());
  if (dtype == Dtype::f16) return f(__half());
  return f(__nv_bfloat16());
}

// Launches a kernel; returns 0 or CUDA's error.
//   shared: bytes of dynamic shared memory
//   overlaps: it may start before the launch before it has ended. Then the kernel calls
//     wait_for_launch_before() before it reads what that launch writes.
template <class Argument>
int launch(void (*kernel)(Argument), dim3 blocks, int threads, size_t shared, uintptr_t stream,
           bool overlaps, const Argument& argument) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess && shared > 48 << 10)
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{blocks,     dim3(threads),
                            shared,     reinterpret_cast<cudaStream_t>(stream),
                            &attribute, overlaps && major >= 9 ? 1u : 0u};
  return cudaLaunchKernelEx(&config, kernel, argument);
}

}  // namespace
}  // namespace peftops::cuda
