// torch.ops.aot_fast_cuda.row_loss: row_loss.cu on tensors.

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "row_loss.h"

namespace aot {
namespace {

using at::Tensor;

Number number_of(at::ScalarType type, const char* name) {
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, name, ": given ", type, ", expected float32 or bfloat16");
  return type == at::kFloat ? Number::fp32 : Number::bf16;
}

bool fits(const Tensor& logits) {
  bool known = logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kBFloat16;
  if (!logits.is_cuda() || logits.dim() != 2 || !known || logits.stride(1) != 1) return false;
  bool apart = logits.size(0) <= 1 || logits.stride(0) >= logits.size(1);
  return apart && logits.size(0) <= std::numeric_limits<int>::max() / 2 && logits.size(1) <= 1 << 20 &&
         reinterpret_cast<uintptr_t>(logits.const_data_ptr()) % 16 == 0 &&
         at::cuda::getDeviceProperties(logits.get_device())->major == 9 &&
         fits_row_loss(logits.size(1), logits.stride(0), number_of(logits.scalar_type(), "logits"));
}

const float* floats(const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

std::tuple<Tensor, Tensor, Tensor> row_loss(const Tensor& logits, const Tensor& targets, const Tensor& advantages,
                                            const std::optional<Tensor>& old, const std::optional<Tensor>& ref, const Tensor& weight,
                                            double temperature, std::string_view loss, std::string_view kl, double ratio_low,
                                            double ratio_high, std::optional<double> dual_clip, double beta, double entropy_coef,
                                            at::ScalarType dtype) {
  TORCH_CHECK(fits(logits), "logits: given ", logits.sizes(), " ", logits.scalar_type(),
              ", expected rows of a multiple of 8 columns, 16-byte aligned, on a device of compute capability 9.x");
  TORCH_CHECK(loss == "ppo" || loss == "cispo", "loss: given '", loss, "', expected 'ppo' or 'cispo'");
  TORCH_CHECK(kl == "k1" || kl == "k2" || kl == "k3", "kl: given '", kl, "', expected 'k1', 'k2' or 'k3'");
  TORCH_CHECK(beta == 0 || ref, "ref: given none, expected [N] because beta is ", beta);
  c10::cuda::CUDAGuard device(logits.device());
  auto options = logits.options().dtype(at::kFloat);
  int64_t n = logits.size(0);
  auto check = [&](const std::optional<Tensor>& t, at::ScalarType type, const char* name) {
    TORCH_CHECK(!t || (t->device() == logits.device() && t->dim() == 1 && t->size(0) == n && t->is_contiguous() && t->scalar_type() == type),
                name, ": given ", t->sizes(), " ", t->scalar_type(), ", expected [", n, "] contiguous ", type, " beside the logits");
  };
  check(targets, at::kLong, "targets"), check(advantages, at::kFloat, "advantages"), check(weight, at::kFloat, "weight");
  check(old, at::kFloat, "old"), check(ref, at::kFloat, "ref");
  Tensor logp = at::empty({n}, options), entropy = at::empty({n}, options), valid = at::empty({n}, options.dtype(at::kBool));
  RowLoss arguments{logits.data_ptr(), logits.stride(0), static_cast<int>(n), static_cast<int>(logits.size(1)),
                    targets.const_data_ptr<int64_t>(), advantages.const_data_ptr<float>(), floats(old), floats(ref),
                    weight.const_data_ptr<float>(), logp.data_ptr<float>(), entropy.data_ptr<float>(), valid.data_ptr<bool>(),
                    static_cast<float>(1 / temperature), loss == "cispo", kl == "k1" ? 1 : kl == "k2" ? 2 : 3,
                    static_cast<float>(ratio_low), static_cast<float>(ratio_high),
                    static_cast<float>(dual_clip.value_or(std::numeric_limits<double>::infinity())), static_cast<float>(beta),
                    static_cast<float>(entropy_coef)};
  C10_CUDA_CHECK(launch_row_loss(arguments, number_of(logits.scalar_type(), "logits"), number_of(dtype, "dtype"),
                                 at::cuda::getCurrentCUDAStream()));
  return {logp, entropy, valid};
}

}  // namespace

TORCH_LIBRARY(aot_fast_cuda, library) {
  library.def("fits(Tensor logits) -> bool", fits);
  library.def(
      "row_loss(Tensor(a0!) logits, Tensor targets, Tensor advantages, Tensor? old, Tensor? ref, Tensor weight, float temperature, str loss, "
      "str kl, float ratio_low, float ratio_high, float? dual_clip, float beta, float entropy_coef, ScalarType dtype) -> "
      "(Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(aot_fast_cuda, CUDA, library) { library.impl("row_loss", row_loss); }

}  // namespace aot
