// flow_policy_loss (kernels/flow_policy_loss.py), in fp64: B is a few thousand samples at most.
//
// A clip range of 2e-6 is 17 units in the last place of an fp32 ratio; here e^d - 1 says how far a ratio is from 1.

#include "common.h"

namespace aot {
namespace {

constexpr double LIMIT = 20;  // kernels/policy_loss.py: LOG_RATIO_LIMIT

// As RESULTS of kernels/flow_policy_loss_triton.py.
enum Result {
  LOSS, SAMPLES, MASKED, ADVANTAGE_CLIPPED, CLIP_LOW, CLIP_HIGH, DROPPED, ZERO_COEFFICIENT, RATIO, KL_K1, KL_K3, ADVANTAGE,
  ADVANTAGE_SQUARED, KL, DRIFT, UNUSED, RATIO_DEVIATION, NUM_RESULTS
};

double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }  // a NaN stays one

struct Settings {
  double clip, beta, tau, adv_clip, weight;
  bool with_kl, guard, dppo;
};

// A sample's numbers, 0 where a tensor was not given.
struct Sample {
  double logp, old, advantage, kl, drift, std, dt;
};

struct Gradients {
  double logp, kl, drift;
};

Gradients add_sample(const Sample& x, const Settings& s, double* results) {
  double advantage = clamp(x.advantage, -s.adv_clip, s.adv_clip), d = x.logp - x.old;
  bool stochastic = (s.guard || s.dppo) && x.std > 0;
  double std = stochastic ? x.std : 1, divergence = stochastic ? x.drift / (2 * std * std) : 0;
  double log_ratio = s.guard ? (d + divergence) * std : d;
  double deviation = std::expm1(clamp(log_ratio, -LIMIT, LIMIT));
  double loss = -advantage * deviation, slope = log_ratio >= -LIMIT && log_ratio <= LIMIT ? -advantage * (1 + deviation) : 0;
  bool dropped = false;
  if (s.dppo) {
    dropped = ((advantage > 0 && deviation > 0) || (advantage < 0 && deviation < 0)) && divergence >= s.tau;
    if (dropped) loss = advantage, slope = 0;
  } else {
    double clipped = -advantage * clamp(deviation, -s.clip, s.clip);
    if (loss < clipped) loss = clipped, slope = 0;
  }
  loss -= advantage;
  Gradients gradients{slope, s.beta, 0};
  if (s.guard) {
    double per_time = -1 / x.dt;
    loss *= per_time;
    gradients.drift = stochastic ? slope * per_time / (2 * std) : 0;
    gradients.logp = slope * per_time * std;
  }
  if (s.with_kl) loss += s.beta * x.kl;

  double k = clamp(d, -LIMIT, LIMIT);
  results[LOSS] += loss * s.weight;
  results[SAMPLES] += 1;
  results[ADVANTAGE_CLIPPED] += x.advantage != advantage;
  results[CLIP_LOW] += advantage < 0 && deviation < -s.clip;
  results[CLIP_HIGH] += advantage > 0 && deviation > s.clip;
  results[DROPPED] += dropped;
  results[ZERO_COEFFICIENT] += gradients.logp * s.weight == 0;
  results[RATIO] += 1 + deviation;
  results[KL_K1] -= k;
  results[KL_K3] += std::expm1(k) - k;
  results[ADVANTAGE] += advantage;
  results[ADVANTAGE_SQUARED] += advantage * advantage;
  results[KL] += x.kl;
  results[DRIFT] += x.drift;
  double size = std::abs(deviation);
  if (size > results[RATIO_DEVIATION] || size != size) results[RATIO_DEVIATION] = size;
  return gradients;
}

class Column {
 public:
  explicit Column(const OptionalTensor& t) : values_(t ? t->to(at::kDouble).contiguous() : Tensor()) {}
  double operator[](int64_t i) const { return values_.defined() ? values_.const_data_ptr<double>()[i] : 0; }

 private:
  Tensor values_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> flow_policy_loss(
    const Tensor& logp, const Tensor& old, const Tensor& advantages, const OptionalTensor& kl, const OptionalTensor& drift,
    const OptionalTensor& std, const OptionalTensor& dt, const OptionalTensor& mask_, const OptionalTensor& number,
    std::optional<double> fixed, double clip, std::optional<double> beta, double tau, double adv_clip, std::string_view variant) {
  int64_t n = logp.size(0);
  require_size(old, n, "old"), require_size(advantages, n, "advantages");
  for (const OptionalTensor& t : {kl, drift, std, dt, mask_}) require_size(t, n, "samples");
  bool guard = variant == "guard";
  auto options = logp.options().dtype(at::kFloat);
  Tensor results = at::empty({NUM_RESULTS}, options), dlogp = at::zeros({n}, options);
  Tensor dkl = at::zeros({beta ? n : 0}, options), ddrift = at::zeros({guard ? n : 0}, options);
  OptionalTensor mask = row_of(mask_);
  const bool* given = flags(mask);
  int64_t num_given = given ? std::count(given, given + n, true) : n;
  double count = number ? number->item().toDouble() : fixed ? *fixed : std::max<double>(1, num_given);
  Settings settings{clip, beta.value_or(0), tau, adv_clip, 1 / count, kl && beta, guard, variant == "dppo"};
  Column columns[] = {Column(logp), Column(old), Column(advantages), Column(kl), Column(drift), Column(std), Column(dt)};
  double totals[NUM_RESULTS] = {};
  for (int64_t i = 0; i < n; ++i) {
    if (given && !given[i]) continue;
    Sample sample{columns[0][i], columns[1][i], columns[2][i], columns[3][i], columns[4][i], columns[5][i], columns[6][i]};
    Gradients gradients = add_sample(sample, settings, totals);
    dlogp.data_ptr<float>()[i] = gradients.logp * settings.weight;
    if (beta) dkl.data_ptr<float>()[i] = gradients.kl * settings.weight;
    if (guard) ddrift.data_ptr<float>()[i] = gradients.drift * settings.weight;
  }
  totals[MASKED] = n - num_given;
  std::copy(totals, totals + NUM_RESULTS, results.data_ptr<float>());
  return {results, dlogp, dkl, ddrift};
}

}  // namespace

TORCH_LIBRARY_IMPL(aot_fast_cpu, CPU, library) { library.impl("flow_policy_loss", flow_policy_loss); }

}  // namespace aot
