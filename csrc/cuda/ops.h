// Every CUDA launcher, outputs first: 0, or CUDA's error.
#pragma once
#include "../tensor.h"

extern "C" {

int device_driver();
int device_runtime();
int device_runs(int index);
const char* device_error(int code);

int lora_gemv(peftops::Tensor y, peftops::Tensor h, peftops::Tensor x, peftops::Tensor w, peftops::Tensor a,
              peftops::Tensor b, peftops::Tensor scale, peftops::Tensor bias, peftops::Tensor gain,
              peftops::Tensor gate, bool given, int processors, uintptr_t stream);
}
