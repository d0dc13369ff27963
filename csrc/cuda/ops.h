// Every CUDA launcher. Outputs come first; the result is 0 or CUDA's error. What the arguments
// mean is said where a launcher is defined.
#pragma once
#include "../tensor.h"

extern "C" {

int device_driver();
int device_runtime();
int device_runs(int index);
const char* device_error(int code);

int dora_norm(peftops::Tensor out, peftops::Tensor sums, peftops::Tensor fragments_a,
              peftops::Tensor fragments_b, peftops::Tensor x, peftops::Tensor w,
              peftops::Tensor table, peftops::Tensor absmax, peftops::Tensor nested,
              peftops::Tensor nested_table, peftops::Tensor offset, peftops::Tensor a,
              peftops::Tensor b, peftops::Tensor scale, peftops::Form form, int64_t block,
              bool tiled, uintptr_t stream);
int lora_gemv(peftops::Tensor y, peftops::Tensor h, peftops::Tensor x, peftops::Tensor w,
              peftops::Tensor table, peftops::Tensor absmax, peftops::Tensor nested,
              peftops::Tensor nested_table, peftops::Tensor offset, peftops::Tensor a,
              peftops::Tensor b, peftops::Tensor scale, peftops::Tensor bias,
              peftops::Tensor gain, peftops::Tensor gate, int64_t block, bool given,
              int processors, uintptr_t stream);
int multi_gemv(peftops::Tensor y, peftops::Tensor h, peftops::Tensor x, peftops::Tensor w,
               peftops::Tensor codes_table, peftops::Tensor absmax, peftops::Tensor nested,
               peftops::Tensor nested_table, peftops::Tensor offset, peftops::Tensor a,
               peftops::Tensor b, peftops::Tensor slots, peftops::Tensor table,
               peftops::Tensor rank, peftops::Tensor scale, peftops::Tensor bias,
               peftops::Tensor gain, int64_t block, bool given, int processors,
               uintptr_t stream);
int nf4_quantize(peftops::Tensor codes, peftops::Tensor absmax, peftops::Tensor w,
                 peftops::Tensor bounds, peftops::Tensor order, int64_t size, int64_t block,
                 uintptr_t stream);
int nf4_dequantize(peftops::Tensor out, peftops::Tensor codes, peftops::Tensor table,
                   peftops::Tensor absmax, peftops::Tensor nested, peftops::Tensor nested_table,
                   peftops::Tensor offset, int64_t block, int64_t k, int64_t first,
                   int64_t rows, int64_t columns, uintptr_t stream);
}
