// What test_emulator.py asks of the emulator: a kernel for each question.
#include <cuda_fp16.h>

#include "ops.h"
#include "ptx.cuh"

namespace peftops::cuda {
namespace {

struct Question {
  float* out;
  const float* in;
  const uint32_t* bits;
  int n;
};

__global__ void shuffles(Question q) {
  const int t = threadIdx.x;
  q.out[t] = __shfl_xor_sync(~0u, q.in[t], 5);
  q.out[32 + t] = __shfl_down_sync(~0u, q.in[t], 3);
  q.out[64 + t] = __shfl_up_sync(~0u, q.in[t], 3, 8);
  q.out[96 + t] = __shfl_sync(~0u, q.in[t], t * 7 % 32);
  q.out[128 + t] = __ballot_sync(~0u, q.in[t] > 0);
  q.out[160 + t] = __any_sync(~0u, t == q.n) + 2 * __all_sync(~0u, t < q.n);
  q.out[192 + t] = __reduce_add_sync(~0u, unsigned(t)) + __reduce_max_sync(~0u, unsigned(t));
}

__global__ void bits(Question q) {
  const int t = threadIdx.x;
  const uint32_t a = q.bits[2 * t], b = q.bits[2 * t + 1];
  uint32_t* out = reinterpret_cast<uint32_t*>(q.out) + 10 * t;
  uint32_t third;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(third) : "r"(a), "r"(b), "r"(a * b));
  out[0] = third;
  out[1] = __byte_perm(a, b, 0x5140);
  out[2] = __funnelshift_l(a, b, 7);
  out[3] = __popc(a) * 64 + __clz(b);
  out[4] = __brev(a);
  out[5] = __umulhi(a, b);
  asm("bfe.u32 %0, %1, 5, 9;" : "=r"(out[6]) : "r"(a));
  asm("bfi.b32 %0, %1, %2, 11, 6;" : "=r"(out[7]) : "r"(a), "r"(b));
  out[8] = uint32_t(int32_t(a) >> 3) + uint32_t(int64_t(int32_t(a)) * int32_t(b) >> 32);
  out[9] = uint32_t(int(a % 1000) / -7) + (float(b) > 2e9f);
}

__global__ void roundings(Question q) {
  const int t = threadIdx.x;
  const float v = q.in[t];
  q.out[t] = __half2float(__float2half_rn(v));
  q.out[32 + t] = __bfloat162float(__float2bfloat16_rn(v));
  const __half2 h =
      __hfma2(__floats2half2_rn(v, 1), __floats2half2_rn(2, 3), __floats2half2_rn(0.5f, v));
  q.out[64 + t] = __low2float(h);
  q.out[96 + t] = __high2float(h);
  q.out[128 + t] = rintf(v) + floorf(v) + int(v);
  q.out[160 + t] = sqrtf(fabsf(v)) + fmaxf(v, 0) + rsqrtf(fabsf(v) + 1) + 1 / v;
}

// n = 0 forgets the barrier
__global__ void barriers(Question q) {
  __shared__ float s[256];
  const int t = threadIdx.x;
  s[t] = q.in[t];
  if (q.n) __syncthreads();
  q.out[t] = s[255 - t];
}

__global__ void warps(Question q) {
  __shared__ float s[32];
  const int t = threadIdx.x;
  s[t] = q.in[t];
  if (q.n) __syncwarp();
  q.out[t] = s[31 - t];
}

__global__ void atomics(Question q) {
  const int t = threadIdx.x + blockIdx.x * blockDim.x;
  atomicAdd(&q.out[0], 1.0f);
  int* whole = reinterpret_cast<int*>(q.out);
  atomicAdd(&whole[1], t);
  atomicMax(&whole[2], t);
  atomicCAS(&whole[3], 0, t + 1);
}

// n = 0 forgets to wait
__global__ void copies(Question q) {
  __shared__ __align__(16) float s[32][4];
  const int t = threadIdx.x;
  copy_async(s[t], q.in + 4 * t, t % 4 == 3 ? 8 : 16);
  commit_copies();
  if (q.n) wait_copies<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) q.out[4 * t + i] = s[31 - t][i];
}

// Lane t gets whatever the tensor core's layout gives it of A (16, 16), B (16, 8) and C (16, 8)
template <class T>
__device__ void product(Question q) {
  const int t = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = q.bits[4 * t + i];
  for (int i = 0; i < 2; ++i) b[i] = q.bits[128 + 2 * t + i];
  for (int i = 0; i < 4; ++i) d[i] = q.in[4 * t + i];
  multiply<T>(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) q.out[4 * t + i] = d[i];
}
__global__ void product_bf16(Question q) { product<__nv_bfloat16>(q); }
__global__ void product_f16(Question q) { product<__half>(q); }

// Four 8x8 matrices whose rows of 16 bytes lie n words apart
__global__ void matrices(Question q) {
  __shared__ __align__(16) uint32_t s[32 * 8];
  const int t = threadIdx.x;
  for (int i = 0; i < 4; ++i) s[t * q.n + i] = q.bits[4 * t + i];
  __syncwarp();
  uint32_t r[4];
  load_matrices(r, s + t * q.n);
  for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(q.out)[4 * t + i] = r[i];
}

__global__ void divergent(Question q) {
  if (threadIdx.x < 16) __syncthreads();
  q.out[threadIdx.x] = 0;
}
__global__ void half_a_mask(Question q) {
  q.out[threadIdx.x] = __shfl_xor_sync(0xffffu, q.in[threadIdx.x], 1);
}
__global__ void misaligned(Question q) {
  q.out[0] = __ldg(reinterpret_cast<const float4*>(q.in + 1)).x;
}
__global__ void nowhere(Question q) { q.out[0] = *reinterpret_cast<float*>(uint64_t(q.n)); }
__global__ void past_the_end(Question q) {
  __shared__ float s[32];
  s[threadIdx.x + 1] = q.in[threadIdx.x];
  __syncthreads();
  q.out[threadIdx.x] = s[threadIdx.x];
}

__global__ void before(Question q) {
  allow_launch_behind();
  q.out[threadIdx.x] = q.in[threadIdx.x];
}
// n = 0 forgets to wait for the launch before
__global__ void behind(Question q) {
  if (q.n) wait_for_launch_before();
  q.out[32 + threadIdx.x] = q.out[threadIdx.x];
}

}  // namespace
}  // namespace peftops::cuda

#define ASK(kernel) \
  if (name == #kernel) kernel<<<blocks, threads>>>(q)

extern "C" int ask(const char* kernel_name, uintptr_t out, uintptr_t in, uintptr_t bits_, int n,
                   int blocks, int threads) {
  using namespace peftops::cuda;
  const Question q{reinterpret_cast<float*>(out), reinterpret_cast<const float*>(in),
                   reinterpret_cast<const uint32_t*>(bits_), n};
  const struct Name {
    const char* text;
    bool operator==(const char* other) const {
      const char* mine = text;
      while (*mine && *mine == *other) ++mine, ++other;
      return *mine == *other;
    }
  } name{kernel_name};
  ASK(shuffles);
  ASK(bits);
  ASK(roundings);
  ASK(barriers);
  ASK(warps);
  ASK(atomics);
  ASK(copies);
  ASK(product_bf16);
  ASK(product_f16);
  ASK(matrices);
  ASK(divergent);
  ASK(half_a_mask);
  ASK(misaligned);
  ASK(nowhere);
  ASK(past_the_end);
  if (name == "overlapping") {
    before<<<1, 32>>>(q);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{dim3(1), dim3(32), 0, nullptr, &attribute, 1};
    return cudaLaunchKernelEx(&config, behind, q);
  }
  return cudaGetLastError();
}
