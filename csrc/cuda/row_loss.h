// What row_loss.cu offers: plain pointers, so that the kernel compiles without torch.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace aot {

// N rows of V logits and what the loss of each depends on; [N] each, null where not given.
struct RowLoss {
  void* logits;  // overwritten: the gradient of a row lies in its first V numbers
  int64_t row_stride;
  int num_rows, num_columns;
  const int64_t* targets;
  const float *advantages, *old_logp, *ref_logp;
  const float* weight;  // 0: no gradient
  float *logp, *entropy;
  bool* valid;
  float inverse_temperature;
  bool cispo;
  int kl;  // 1, 2, 3: k1, k2, k3
  float ratio_low, ratio_high;
  float dual_clip;  // infinite: none
  float beta, entropy_coef;
};

enum class Number { fp32, bf16 };

// Whether rows of this many columns and of this stride can be copied in bulk and held by a cluster.
bool fits_row_loss(int num_columns, int64_t row_stride, Number logits);

// Gradients of bf16, or of fp32 in fp32 logits. Needs an sm_90 device and fits_row_loss.
cudaError_t launch_row_loss(const RowLoss& arguments, Number logits, Number gradient, cudaStream_t stream);

}  // namespace aot
