// What `peftops doctor` asks of CUDA: the versions of driver and runtime, and whether this
// library has code for a GPU.
#include <cuda_runtime.h>

#include "ops.h"

namespace {

// Does nothing: it stands for all kernels when device_runs asks whether one can be loaded.
// limits: instructions 1-
__global__ void device_runs_kernel() {}

}  // namespace

// 13000 means 13.0, and 0 that there is no driver.
extern "C" int device_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

extern "C" int device_runtime() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

extern "C" const char* device_error(int code) { return cudaGetErrorString(cudaError_t(code)); }

// 0 if this library has code for the GPU of this index, otherwise CUDA's error. 209 means that
// it has none.
extern "C" int device_runs(int index) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(index);
  if (error == cudaSuccess) {
    // Loads the kernel, as a launch would, but starts nothing.
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, device_runs_kernel);
    cudaSetDevice(before);
  }
  if (error != cudaSuccess) cudaGetLastError();  // clears it, else torch would report it later
  return error;
}
