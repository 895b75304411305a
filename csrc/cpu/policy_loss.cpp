// policy_loss (kernels/policy_loss.py): loss, gradient and metrics of N tokens in one pass, the normaliser in a second over the sums.
//
// Sums are in fp32 within 1,024 tokens and in fp64 over these blocks, in order, whatever the number of threads.

#include "autograd.h"
#include "common.h"

namespace aot {

constexpr float LIMIT = 20.0f;  // kernels/policy_loss.py: LOG_RATIO_LIMIT
constexpr int64_t TOKENS_A_BLOCK = 1024;

// As ROWS of kernels/policy_kernels_triton.py.
enum Sum {
  LOSS, TOKENS, RATIO, CLIP_LOW, CLIP_HIGH, CLIP_DUAL, KL_K1, KL_K3, ADVANTAGE, ADVANTAGE_SQUARED, ZERO_COEFFICIENT, MASKED, INVALID,
  KL_REF, ENTROPY, SEQUENCES, RATIO_DEVIATION, NUM_SUMS
};

struct TokenPass {
  int64_t num_tokens;
  Numbers logp, advantages, old, ref, entropy, weight;
  const bool *mask, *valid;
  const float *sequence_log_ratio, *sequence_gradient;  // null but for gspo
  bool cispo;
  int kl;  // 1, 2 or 3
  float ratio_low, ratio_high;
  bool with_dual_clip;
  float dual_clip, beta, entropy_coef;
  float *gradient, *bonus;
  double* partials;
};

}  // namespace aot

#define AOT_KERNELS "policy_loss.inc"
#include "each_isa.h"

namespace aot {
namespace {

// What a sequence's tokens share: 1 / length (seq_mean), the mean log-ratio and the gradient that it sends to each of them (gspo).
struct Sequences {
  std::vector<float> weight, log_ratio, gradient;
  int64_t num_live = 0;  // sequences with a live token
};

struct SequenceInputs {
  Tensor logp, advantages, old, weight, ids;  // floats; ids int64
  const bool *mask, *valid;
  bool gspo, seq_mean;
  float ratio_low, ratio_high;

  bool live(int64_t i) const { return (!mask || mask[i]) && (!valid || valid[i]); }
};

double surrogate_slope(double ratio, double advantage, double low, double high) {
  double plain = ratio * advantage, clipped = std::min(std::max(ratio, low), high) * advantage;
  if ((ratio >= low && ratio <= high) || plain < clipped) return advantage;
  return plain == clipped ? 0.5 * advantage : 0;
}

void one_sequence(const SequenceInputs& in, int64_t start, int64_t stop, Sequences& out) {
  const float *logp = in.logp.const_data_ptr<float>(), *advantages = in.advantages.const_data_ptr<float>();
  const float* old = in.old.defined() ? in.old.const_data_ptr<float>() : logp;
  const float* weight = in.weight.defined() ? in.weight.const_data_ptr<float>() : nullptr;
  int64_t count = 0;
  for (int64_t i = start; i < stop; ++i) count += in.live(i);
  out.num_live += count > 0;
  double length = std::max<int64_t>(count, 1);
  if (in.seq_mean) std::fill(out.weight.begin() + start, out.weight.begin() + stop, static_cast<float>(1 / length));
  if (!in.gspo) return;
  double total = 0;
  for (int64_t i = start; i < stop; ++i)
    if (in.live(i)) total += static_cast<double>(logp[i]) - old[i];
  double mean = total / length, ratio = std::exp(std::min(std::max(mean, -double(LIMIT)), double(LIMIT))), slope = 0;
  if (mean != mean) ratio = mean;
  for (int64_t i = start; i < stop; ++i)
    if (in.live(i))
      slope += surrogate_slope(ratio, advantages[i], in.ratio_low, in.ratio_high) * (weight ? weight[i] : in.seq_mean ? 1 / length : 1);
  bool inside = mean >= -LIMIT && mean <= LIMIT;
  std::fill(out.log_ratio.begin() + start, out.log_ratio.begin() + stop, static_cast<float>(mean));
  std::fill(out.gradient.begin() + start, out.gradient.begin() + stop, inside ? static_cast<float>(-slope * ratio / length) : 0.0f);
}

Sequences sequences_of(const SequenceInputs& in) {
  Sequences out;
  int64_t n = in.ids.size(0);
  const int64_t* ids = in.ids.const_data_ptr<int64_t>();
  if (in.seq_mean) out.weight.resize(n);
  if (in.gspo) out.log_ratio.resize(n), out.gradient.resize(n);
  for (int64_t start = 0, stop; start < n; start = stop) {
    for (stop = start + 1; stop < n && ids[stop] == ids[start];) ++stop;
    one_sequence(in, start, stop, out);
  }
  return out;
}

Tensor floats(const OptionalTensor& t) { return t ? t->to(at::kFloat).contiguous() : Tensor(); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss_forward(
    const Tensor& logp_, const OptionalTensor& entropy_, const Tensor& advantages_, const OptionalTensor& old_, const OptionalTensor& ref_,
    const OptionalTensor& mask_, const OptionalTensor& valid_, const OptionalTensor& seq_ids, const OptionalTensor& weight_,
    const OptionalTensor& number, std::optional<double> fixed, double divisor, std::string_view loss, std::string_view kl,
    std::string_view agg, double ratio_low, double ratio_high, std::optional<double> dual_clip, std::optional<double> beta,
    std::optional<double> entropy_coef) {
  Tensor logp = row_of(logp_), advantages = row_of(advantages_);
  OptionalTensor entropy = row_of(entropy_), old = row_of(old_), ref = row_of(ref_), weight = row_of(weight_);
  OptionalTensor mask = row_of(mask_), valid = row_of(valid_);
  int64_t n = logp.size(0), num_blocks = (n + TOKENS_A_BLOCK - 1) / TOKENS_A_BLOCK;
  require_size(advantages, n, "advantages");
  for (const OptionalTensor& t : {entropy, old, ref, mask, valid, seq_ids, weight}) require_size(t, n, "tokens");
  bool gspo = loss == "gspo", seq_mean = agg == "seq_mean" && !weight;

  Sequences sequences;
  bool counts_sequences = agg != "token" && !number && !fixed;
  if (n && seq_ids && (gspo || seq_mean || counts_sequences)) {
    SequenceInputs in{floats(logp), floats(advantages), floats(old), floats(weight), seq_ids->to(at::kLong).contiguous(),
                      flags(mask), flags(valid), gspo, seq_mean, static_cast<float>(ratio_low), static_cast<float>(ratio_high)};
    sequences = sequences_of(in);
  }

  auto options = logp.options().dtype(at::kFloat);
  Tensor value = at::empty({}, options), gradient = at::empty({n}, options), scale = at::empty({}, options);
  Tensor bonus = at::empty({entropy && entropy_coef ? n : 0}, options), results = at::empty({NUM_SUMS}, options);
  std::vector<double> partials(num_blocks * NUM_SUMS);
  TokenPass pass{n, Numbers(logp), Numbers(advantages), Numbers(old), Numbers(ref), Numbers(entropy), Numbers(weight),
                 flags(mask), flags(valid), gspo ? sequences.log_ratio.data() : nullptr, gspo ? sequences.gradient.data() : nullptr,
                 loss == "cispo", kl == "k1" ? 1 : kl == "k2" ? 2 : 3, static_cast<float>(ratio_low), static_cast<float>(ratio_high),
                 dual_clip.has_value(), static_cast<float>(dual_clip.value_or(0)), static_cast<float>(beta.value_or(0)),
                 static_cast<float>(entropy_coef.value_or(0)), gradient.data_ptr<float>(),
                 bonus.numel() ? bonus.data_ptr<float>() : nullptr, partials.data()};
  if (n && seq_mean) {
    pass.weight.data = sequences.weight.data();
    pass.weight.type = at::kFloat;
  }
  parallel(num_blocks, 4 * TOKENS_A_BLOCK, [&](int64_t begin, int64_t end) { AOT_CALL(tokens, pass, begin, end); });

  double total[NUM_SUMS] = {}, largest = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const double* part = partials.data() + block * NUM_SUMS;
    for (int k = 0; k < RATIO_DEVIATION; ++k) total[k] += part[k];
    double deviation = part[RATIO_DEVIATION];
    if (deviation > largest || deviation != deviation) largest = deviation;
  }
  total[SEQUENCES] = sequences.num_live;
  total[RATIO_DEVIATION] = largest;
  double count = number ? number->item().toDouble() : fixed ? *fixed : std::max(1.0, total[agg == "token" ? TOKENS : SEQUENCES]);
  double factor = total[TOKENS] == 0 ? 0 : 1 / (count * divisor);  // a global count may be 0 where nothing is left
  *scale.data_ptr<float>() = factor;
  *value.data_ptr<float>() = factor * total[LOSS];
  std::copy(total, total + NUM_SUMS, results.data_ptr<float>());
  return {value, gradient, bonus, scale, results};
}

std::tuple<Tensor, Tensor> policy_loss_backward(const Tensor& gradient, const Tensor& bonus, const Tensor& scale, const Tensor& upstream,
                                                at::ScalarType dtype, at::ScalarType bonus_dtype) {
  float factor = scale.item().toFloat() * upstream.item().toFloat();
  auto scaled = [&](const Tensor& values, at::ScalarType wanted) {
    at::ScalarType type = wanted == at::kDouble ? at::kFloat : wanted;
    require_float(type);
    Tensor out = at::empty(values.sizes(), values.options().dtype(type));
    const float* data = values.const_data_ptr<float>();
    parallel(values.numel(), 1, [&](int64_t begin, int64_t end) { AOT_CALL(scale, data, factor, out.data_ptr(), type, begin, end); });
    return out.to(wanted);
  };
  return {scaled(gradient, dtype), scaled(bonus, bonus_dtype)};
}

class PolicyLoss : public torch::autograd::Function<PolicyLoss> {
 public:
  template <class... Rest>
  static variable_list forward(Context* context, const Tensor& logp, const OptionalTensor& entropy, const Rest&... rest) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, gradient, bonus, scale, results] =
        operator_named<decltype(policy_loss_forward)>("aot_fast_cpu::policy_loss_forward").call(logp, entropy, rest...);
    context->save_for_backward({gradient, bonus, scale});
    context->saved_data["logp"] = logp.scalar_type();
    context->saved_data["entropy"] = entropy ? entropy->scalar_type() : at::kFloat;
    context->mark_non_differentiable({results});
    return {loss, results};
  }

  static variable_list backward(Context* context, variable_list upstream) {
    variable_list inputs(NUM_INPUTS);
    if (!upstream[0].defined()) return inputs;
    refuse_twice(upstream);
    auto saved = context->get_saved_variables();
    auto [dlogp, dentropy] = operator_named<decltype(policy_loss_backward)>("aot_fast_cpu::policy_loss_backward")
                                 .call(saved[0], saved[1], saved[2], upstream[0], context->saved_data["logp"].toScalarType(),
                                       context->saved_data["entropy"].toScalarType());
    inputs[0] = dlogp;
    if (saved[1].numel()) inputs[1] = dentropy;
    return inputs;
  }

 private:
  static constexpr size_t NUM_INPUTS = 20;
};

std::tuple<Tensor, Tensor> policy_loss(
    const Tensor& logp, const OptionalTensor& entropy, const Tensor& advantages, const OptionalTensor& old, const OptionalTensor& ref,
    const OptionalTensor& mask, const OptionalTensor& valid, const OptionalTensor& seq_ids, const OptionalTensor& weight,
    const OptionalTensor& number, std::optional<double> fixed, double divisor, std::string_view loss, std::string_view kl,
    std::string_view agg, double ratio_low, double ratio_high, std::optional<double> dual_clip, std::optional<double> beta,
    std::optional<double> entropy_coef) {
  auto out = PolicyLoss::apply(logp, entropy, advantages, old, ref, mask, valid, seq_ids, weight, number, fixed, divisor, loss, kl, agg,
                               ratio_low, ratio_high, dual_clip, beta, entropy_coef);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(aot_fast_cpu, CompositeImplicitAutograd, library) { library.impl("policy_loss", policy_loss); }

TORCH_LIBRARY_IMPL(aot_fast_cpu, CPU, library) {
  library.impl("policy_loss_forward", policy_loss_forward);
  library.impl("policy_loss_backward", policy_loss_backward);
}

}  // namespace aot
