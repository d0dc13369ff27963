// What peftops doctor asks of CUDA: which driver and runtime there are, and whether this
// library runs on a GPU.
#include <cuda_runtime.h>

#include "ops.h"

namespace {

// limits: instructions 1-
__global__ void device_runs_kernel() {}

}  // namespace

// 13000 is 13.0; 0 where there is no driver
extern "C" int device_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

extern "C" int device_runtime() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

extern "C" const char* device_error(int code) { return cudaGetErrorString(cudaError_t(code)); }

// 0 where this library has code for the GPU of this index, otherwise CUDA's error: 209 is no
// code for it
extern "C" int device_runs(int index) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(index);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(
        &attributes, device_runs_kernel);  // loads it, as a launch would, but starts nothing
    cudaSetDevice(before);
  }
  if (error != cudaSuccess) cudaGetLastError();  // else torch would meet it
  return error;
}
