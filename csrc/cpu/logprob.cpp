// logprob (kernels/logprob.py): log-probability of the targets, entropy, and dlogits, with one read of the logits from memory a pass.
//
// A row of 32,000 floats stays in the second cache between its maximum and its sums. N rows, V columns.

#include "common.h"

namespace aot {

struct StatsPass {
  Numbers logits;
  const int64_t* targets;
  int64_t num_columns;
  float inverse_temperature;
  float *logp, *entropy;
  bool* valid;
  float *highest, *log_sum;
};

struct GradientPass {
  Numbers logits;
  const int64_t* targets;
  int64_t num_columns;
  float inverse_temperature;
  const float *logp, *entropy;
  const bool* valid;
  const float *highest, *log_sum;
  const float *dlogp, *dentropy;  // null: none
  void* gradient;                 // may be the logits' own memory
  at::ScalarType type;
  int64_t gradient_stride;
};

}  // namespace aot

#define AOT_KERNELS "logprob.inc"
#include "each_isa.h"

namespace aot {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats(const Tensor& logits, const Tensor& targets, double temperature) {
  Tensor rows = readable(logits), indices = targets.to(at::kLong).contiguous();
  int64_t n = rows.size(0);
  require_size(indices, n, "targets");
  Tensor logp = at::empty({n}, rows.options().dtype(at::kFloat));
  Tensor entropy = at::empty_like(logp), highest = at::empty_like(logp), log_sum = at::empty_like(logp);
  Tensor valid = at::empty({n}, rows.options().dtype(at::kBool));
  StatsPass pass{Numbers(rows), indices.const_data_ptr<int64_t>(), rows.size(1), static_cast<float>(1 / temperature),
                 logp.data_ptr<float>(), entropy.data_ptr<float>(), valid.data_ptr<bool>(), highest.data_ptr<float>(),
                 log_sum.data_ptr<float>()};
  parallel(n, rows.size(1), [&](int64_t begin, int64_t end) { AOT_CALL(row_stats, pass, begin, end); });
  return {logp, entropy, valid, highest, log_sum};
}

void gradient_into(const Tensor& rows, const Tensor& targets, const Tensor& logp, const Tensor& entropy, const Tensor& valid,
                   const Tensor& highest, const Tensor& log_sum, const OptionalTensor& dlogp, const OptionalTensor& dentropy,
                   double temperature, void* gradient, at::ScalarType type, int64_t gradient_stride) {
  for (const Tensor& t : {targets, logp, entropy, valid, highest, log_sum}) require_size(t, rows.size(0), "statistics");
  require_size(dlogp, rows.size(0), "dlogp"), require_size(dentropy, rows.size(0), "dentropy");
  auto floats = [](const Tensor& t) { return t.to(at::kFloat).contiguous(); };
  Tensor indices = targets.to(at::kLong).contiguous(), flag = valid.contiguous();
  Tensor stats[] = {floats(logp), floats(entropy), floats(highest), floats(log_sum)};
  Tensor up = dlogp ? floats(*dlogp) : Tensor(), bonus = dentropy ? floats(*dentropy) : Tensor();
  GradientPass pass{Numbers(rows), indices.const_data_ptr<int64_t>(), rows.size(1), static_cast<float>(1 / temperature),
                    stats[0].const_data_ptr<float>(), stats[1].const_data_ptr<float>(), flag.const_data_ptr<bool>(),
                    stats[2].const_data_ptr<float>(), stats[3].const_data_ptr<float>(),
                    dlogp ? up.const_data_ptr<float>() : nullptr, dentropy ? bonus.const_data_ptr<float>() : nullptr,
                    gradient, type, gradient_stride};
  parallel(rows.size(0), rows.size(1), [&](int64_t begin, int64_t end) { AOT_CALL(logit_gradient, pass, begin, end); });
}

Tensor logit_gradient(const Tensor& logits, const Tensor& targets, const Tensor& logp, const Tensor& entropy, const Tensor& valid,
                      const Tensor& highest, const Tensor& log_sum, const OptionalTensor& dlogp, const OptionalTensor& dentropy,
                      double temperature, at::ScalarType dtype) {
  Tensor rows = readable(logits);
  at::ScalarType type = dtype == at::kDouble ? at::kFloat : dtype;
  require_float(type);
  Tensor gradient = at::empty(logits.sizes(), logits.options().dtype(type));
  gradient_into(rows, targets, logp, entropy, valid, highest, log_sum, dlogp, dentropy, temperature, gradient.data_ptr(), type,
                rows.size(1));
  return gradient.to(dtype);
}

// The gradient as numbers of `dtype` (no wider than the logits) in the first bytes of each row's own memory.
void logit_gradient_in_place(const Tensor& logits, const Tensor& targets, const Tensor& logp, const Tensor& entropy, const Tensor& valid,
                             const Tensor& highest, const Tensor& log_sum, const Tensor& dlogp, const OptionalTensor& dentropy,
                             double temperature, at::ScalarType dtype) {
  require_float(dtype);
  TORCH_CHECK(logits.stride(1) == 1 && c10::elementSize(dtype) <= c10::elementSize(logits.scalar_type()),
              "logits: given ", logits.scalar_type(), " with column stride ", logits.stride(1), ", expected rows at least as wide as ", dtype);
  int64_t stride = logits.stride(0) * (c10::elementSize(logits.scalar_type()) / c10::elementSize(dtype));
  gradient_into(logits, targets, logp, entropy, valid, highest, log_sum, dlogp, dentropy, temperature, logits.data_ptr(), dtype, stride);
}

}  // namespace

TORCH_LIBRARY_IMPL(aot_fast_cpu, CPU, library) {
  library.impl("row_stats", row_stats);
  library.impl("logit_gradient", logit_gradient);
  library.impl("logit_gradient_in_place", logit_gradient_in_place);
}

}  // namespace aot
