// flow_step, flow_logp and guided_velocity (kernels/flow_step.py, kernels/guidance.py): one read of every tensor in each direction.
//
// A sample goes block by block (whole tokens where velocities are rescaled); sums of squares are in fp32 within a block and in fp64 over the
// blocks, in order. Rollout and replay score a step with the same functions: given the same v, with the same bits.

#include "autograd.h"
#include "common.h"

namespace aot {

constexpr float TINY = std::numeric_limits<float>::min();

struct Guidance {
  float scale;
  bool rescale;
  int64_t channels;
};

struct StepPass {
  int64_t num_elements, block, blocks;  // of a sample
  Numbers x, v, v_uncond, x_next, noise, v_ref, v_old;
  const int64_t* seeds;
  const float *a, *b, *std;
  Guidance guidance;
  bool rollout;
  double* sums;  // [samples, blocks, 3]: of the residual, of the distances to v_ref and v_old
};

// What multiplies the differences in dL/dv of a sample.
struct Coefficients {
  float logp = 0, kl = 0, drift = 0;
};

struct StepGradientPass {
  StepPass step;
  const Coefficients* coefficients;
  void *dv, *dv_uncond;
};

struct GuidancePass {
  int64_t num_elements, block;
  Numbers v, v_uncond;
  Guidance guidance;
  float* velocity;
  const float* upstream;  // null: forward
  void *dv, *dv_uncond;
};

// Blocks of floats that a thread works in.
class Scratch {
 public:
  Scratch(int64_t block, int64_t count) : block_(block), floats_(block * count) {}
  float* operator[](int64_t k) { return floats_.data() + k * block_; }

 private:
  int64_t block_;
  std::vector<float> floats_;
};

// Philox4x32-10 and Box-Muller, as kernels/philox.py.
static void normals_of_block(int64_t seed, uint64_t block, float* out) {
  uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0};
  uint32_t k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
                        static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;
  }
  for (int pair = 0; pair < 2; ++pair) {
    float u = static_cast<float>(c[2 * pair]) * 0x1p-32f + 0x1p-33f, t = static_cast<float>(c[2 * pair + 1] >> 8) * 0x1p-24f;
    double radius = std::sqrt(-2 * std::log(static_cast<double>(u))), angle = 2 * M_PI * t;
    out[2 * pair] = radius * std::cos(angle);
    out[2 * pair + 1] = radius * std::sin(angle);
  }
}

}  // namespace aot

#define AOT_KERNELS "flow.inc"
#include "each_isa.h"

namespace aot {
namespace {

constexpr int64_t BLOCK = 1024;

// Elements handled at a time: whole tokens where they are rescaled.
int64_t block_of(const Guidance& g) { return g.rescale ? std::max<int64_t>(1, BLOCK / std::max<int64_t>(1, g.channels)) * g.channels : BLOCK; }

Guidance guidance_of(const Tensor& v, const OptionalTensor& uncond, double scale, bool rescale) {
  return {static_cast<float>(scale), rescale && uncond, v.size(-1)};
}

// A step's fp64 scalars of each sample (kernels/flow_dynamics.py), and as floats.
struct Scalars {
  std::vector<Tensor> exact;
  std::vector<float> a, b, std;

  explicit Scalars(at::TensorList step) {
    TORCH_CHECK(step.size() == 4, "step: given ", step.size(), " tensors, expected 4");
    for (const Tensor& t : step) exact.push_back(t.to(at::kDouble).contiguous());
    auto floats = [&](int k) { return std::vector<float>(of(k), of(k) + exact[k].numel()); };
    a = floats(0), b = floats(1), std = floats(2);
  }
  const double* of(int k) const { return exact[k].const_data_ptr<double>(); }
};

// The tensors of a pass, kept alive beside it.
struct StepTensors {
  Tensor x, v;
  OptionalTensor v_uncond, x_next, noise, v_ref, v_old, seeds;
};

StepPass pass_of(const StepTensors& t, const Scalars& scalars, double guidance, bool rescale, bool rollout) {
  for (const OptionalTensor& u : {OptionalTensor(t.v), t.v_uncond, t.x_next, t.noise, t.v_ref, t.v_old}) require_shape(u, t.x, "latents");
  require_size(t.seeds, t.x.size(0), "seeds");
  for (const Tensor& u : scalars.exact) require_size(u, t.x.size(0), "step");
  StepPass pass{};
  pass.num_elements = t.x.size(0) ? t.x.numel() / t.x.size(0) : 0;
  pass.guidance = guidance_of(t.v, t.v_uncond, guidance, rescale);
  pass.block = std::max<int64_t>(1, block_of(pass.guidance));
  pass.blocks = (pass.num_elements + pass.block - 1) / pass.block;
  pass.x = Numbers(t.x), pass.v = Numbers(t.v), pass.v_uncond = Numbers(t.v_uncond), pass.x_next = Numbers(t.x_next);
  pass.noise = Numbers(t.noise), pass.v_ref = Numbers(t.v_ref), pass.v_old = Numbers(t.v_old);
  pass.seeds = t.seeds ? t.seeds->const_data_ptr<int64_t>() : nullptr;
  pass.a = scalars.a.data(), pass.b = scalars.b.data(), pass.std = scalars.std.data();
  pass.rollout = rollout;
  return pass;
}

std::tuple<Tensor, Tensor, Tensor> score(const StepTensors& t, at::TensorList step, double guidance, bool rescale, bool published,
                                         bool flow_grpo_kl, bool rollout) {
  int64_t batch = t.x.size(0);
  auto options = t.x.options().dtype(at::kFloat);
  Tensor logp = at::empty({batch}, options), kl = at::empty({t.v_ref ? batch : 0}, options);
  Tensor drift = at::empty({t.v_old ? batch : 0}, options);
  Scalars scalars(step);
  StepPass pass = pass_of(t, scalars, guidance, rescale, rollout);
  std::vector<double> sums(batch * pass.blocks * 3);
  pass.sums = sums.data();
  parallel(batch * pass.blocks, 2 * pass.block, [&](int64_t begin, int64_t end) { AOT_CALL(steps, pass, begin, end); });
  for (int64_t sample = 0; sample < batch; ++sample) {
    double mean[3] = {};
    for (int64_t block = 0; block < pass.blocks; ++block)
      for (int k = 0; k < 3; ++k) mean[k] += sums[(sample * pass.blocks + block) * 3 + k];
    for (double& m : mean) m /= std::max<int64_t>(1, pass.num_elements);
    double b = scalars.of(1)[sample], std = scalars.of(2)[sample], width = flow_grpo_kl ? scalars.of(3)[sample] : std;
    bool stochastic = std > 0;
    double value = published ? -mean[0] : -mean[0] / (2 * std * std) - 0.5 * std::log(2 * M_PI * std * std);
    logp.data_ptr<float>()[sample] = stochastic ? value : 0;
    if (t.v_ref) kl.data_ptr<float>()[sample] = stochastic ? b * b * mean[1] / (2 * width * width) : 0;
    if (t.v_old) drift.data_ptr<float>()[sample] = b * b * mean[2];
  }
  return {logp, kl, drift};
}

std::tuple<Tensor, Tensor> flow_step(const Tensor& x, const Tensor& v, const OptionalTensor& v_uncond, const OptionalTensor& noise,
                                     const OptionalTensor& seeds, at::TensorList step, double guidance, bool rescale, bool published,
                                     at::ScalarType storage) {
  at::ScalarType narrow = storage == at::kDouble ? at::kFloat : storage;
  require_float(narrow);
  Tensor x_next = at::empty(x.sizes(), x.options().dtype(narrow));
  StepTensors t{readable(x), readable(v), readable(v_uncond), x_next, readable(noise), {}, {}, {}};
  if (seeds) t.seeds = seeds->contiguous();
  Tensor logp = std::get<0>(score(t, step, guidance, rescale, published, false, true));
  return {x_next.to(storage), logp};
}

std::tuple<Tensor, Tensor, Tensor> flow_logp(const Tensor& x, const Tensor& v, const OptionalTensor& v_uncond, const Tensor& x_next,
                                             const OptionalTensor& v_ref, const OptionalTensor& v_old, at::TensorList step,
                                             double guidance, bool rescale, bool published, bool flow_grpo_kl) {
  StepTensors t{readable(x), readable(v), readable(v_uncond), readable(x_next), {}, readable(v_ref), readable(v_old), {}};
  return score(t, step, guidance, rescale, published, flow_grpo_kl, false);
}

std::vector<Coefficients> coefficients_of(const Scalars& scalars, int64_t batch, double n, const OptionalTensor& dlogp,
                                          const OptionalTensor& dkl, const OptionalTensor& ddrift, bool published, bool flow_grpo_kl) {
  std::vector<Coefficients> out(batch);
  for (const OptionalTensor& t : {dlogp, dkl, ddrift}) require_size(t, batch, "upstream");
  auto upstream = [](const OptionalTensor& t) { return t ? t->to(at::kFloat) : Tensor(); };  // of any stride
  Tensor ups[] = {upstream(dlogp), upstream(dkl), upstream(ddrift)};
  auto up = [&](int k, int64_t sample) {
    return ups[k].defined() ? ups[k].const_data_ptr<float>()[sample * ups[k].stride(0)] / n : 0;
  };
  for (int64_t sample = 0; sample < batch; ++sample) {
    double b = scalars.of(1)[sample], std = scalars.of(2)[sample], width = flow_grpo_kl ? scalars.of(3)[sample] : std;
    if (std > 0) {
      out[sample].logp = up(0, sample) * (published ? 2 * b : b / (std * std));
      out[sample].kl = up(1, sample) * b * b / (width * width);
    }
    out[sample].drift = up(2, sample) * 2 * b * b;
  }
  return out;
}

Tensor empty_like_sizes(const Tensor& t) { return at::empty(t.sizes(), t.options()); }

std::tuple<Tensor, Tensor> flow_logp_gradient(const Tensor& x, const Tensor& v, const OptionalTensor& v_uncond, const Tensor& x_next,
                                              const OptionalTensor& v_ref, const OptionalTensor& v_old, at::TensorList step,
                                              const OptionalTensor& dlogp, const OptionalTensor& dkl, const OptionalTensor& ddrift,
                                              double guidance, bool rescale, bool published, bool flow_grpo_kl) {
  StepTensors t{readable(x), readable(v), readable(v_uncond), readable(x_next), {}, readable(v_ref), readable(v_old), {}};
  TORCH_CHECK((!dkl || v_ref) && (!ddrift || v_old), "upstream: given that of a score whose v_ref or v_old is not");
  Scalars scalars(step);
  StepGradientPass pass{pass_of(t, scalars, guidance, rescale, false), nullptr, nullptr, nullptr};
  double n = std::max<int64_t>(1, pass.step.num_elements);
  auto coefficients = coefficients_of(scalars, x.size(0), n, dlogp, dkl, ddrift, published, flow_grpo_kl);
  Tensor dv = empty_like_sizes(t.v), dv_uncond = t.v_uncond ? empty_like_sizes(*t.v_uncond) : at::empty({0}, v.options());
  pass.coefficients = coefficients.data(), pass.dv = dv.data_ptr(), pass.dv_uncond = t.v_uncond ? dv_uncond.data_ptr() : nullptr;
  int64_t units = x.size(0) * pass.step.blocks;
  parallel(units, 2 * pass.step.block, [&](int64_t begin, int64_t end) { AOT_CALL(step_gradients, pass, begin, end); });
  return {dv.to(v.scalar_type()), v_uncond ? dv_uncond.to(v_uncond->scalar_type()) : dv_uncond};
}

class ScoredStep : public torch::autograd::Function<ScoredStep> {
 public:
  static variable_list forward(Context* context, const Tensor& x, const Tensor& v, const OptionalTensor& v_uncond, const Tensor& x_next,
                               const OptionalTensor& v_ref, const OptionalTensor& v_old, at::TensorList step, double guidance, bool rescale,
                               bool published, bool flow_grpo_kl) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [logp, kl, drift] = operator_named<decltype(flow_logp)>("aot_fast_cpu::flow_logp")
                                 .call(x, v, v_uncond, x_next, v_ref, v_old, step, guidance, rescale, published, flow_grpo_kl);
    variable_list saved{x, v, v_uncond.value_or(Tensor()), x_next, v_ref.value_or(Tensor()), v_old.value_or(Tensor())};
    saved.insert(saved.end(), step.begin(), step.end());
    context->save_for_backward(std::move(saved));
    context->saved_data["guidance"] = guidance;
    context->saved_data["flags"] = int64_t{rescale} | int64_t{published} << 1 | int64_t{flow_grpo_kl} << 2;
    context->set_materialize_grads(false);
    return {logp, kl, drift};
  }

  static variable_list backward(Context* context, variable_list upstream) {
    refuse_twice(upstream);
    auto saved = context->get_saved_variables();
    std::vector<Tensor> step(saved.begin() + 6, saved.end());
    variable_list inputs(10 + step.size());  // of forward's arguments the list counts by its tensors
    auto given = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    if (!upstream[0].defined() && !upstream[1].defined() && !upstream[2].defined()) return inputs;
    int64_t flags = context->saved_data["flags"].toInt();
    auto [dv, dv_uncond] = operator_named<decltype(flow_logp_gradient)>("aot_fast_cpu::flow_logp_gradient")
                               .call(saved[0], saved[1], given(saved[2]), saved[3], given(saved[4]), given(saved[5]), step,
                                     given(upstream[0]), given(upstream[1]), given(upstream[2]),
                                     context->saved_data["guidance"].toDouble(), flags & 1, flags >> 1 & 1, flags >> 2 & 1);
    inputs[1] = dv;
    if (saved[2].defined()) inputs[2] = dv_uncond;
    return inputs;
  }
};

// flow_logp, differentiable in v and v_uncond; kl and drift without v_ref or v_old are empty.
std::tuple<Tensor, Tensor, Tensor> scored_step(const Tensor& x, const Tensor& v, const OptionalTensor& v_uncond, const Tensor& x_next,
                                               const OptionalTensor& v_ref, const OptionalTensor& v_old, at::TensorList step,
                                               double guidance, bool rescale, bool published, bool flow_grpo_kl) {
  auto out = ScoredStep::apply(x, v, v_uncond, x_next, v_ref, v_old, step, guidance, rescale, published, flow_grpo_kl);
  return {out[0], out[1], out[2]};
}

GuidancePass guidance_pass(const Tensor& v, const Tensor& uncond, double guidance, bool rescale) {
  require_size(uncond, v.numel(), "v_uncond");
  GuidancePass pass{};
  pass.num_elements = v.numel();
  pass.v = Numbers(v), pass.v_uncond = Numbers(uncond);
  pass.guidance = {static_cast<float>(guidance), rescale, v.dim() ? v.size(-1) : 1};
  pass.block = std::max<int64_t>(1, block_of(pass.guidance));
  return pass;
}

void run(const GuidancePass& pass) {
  int64_t units = (pass.num_elements + pass.block - 1) / pass.block;
  parallel(units, 2 * pass.block, [&](int64_t begin, int64_t end) { AOT_CALL(guided_velocities, pass, begin, end); });
}

Tensor guided_velocity(const Tensor& v, const Tensor& v_uncond, double guidance, bool rescale) {
  Tensor rows = row_of(v), uncond = row_of(v_uncond), out = at::empty(v.sizes(), v.options().dtype(at::kFloat));
  GuidancePass pass = guidance_pass(rows, uncond, guidance, rescale);
  pass.velocity = out.data_ptr<float>();
  run(pass);
  return out;
}

std::tuple<Tensor, Tensor> guided_velocity_gradient(const Tensor& v, const Tensor& v_uncond, const Tensor& gradient, double guidance,
                                                    bool rescale) {
  Tensor rows = row_of(v), uncond = row_of(v_uncond), up = gradient.to(at::kFloat).contiguous();
  Tensor dv = empty_like_sizes(rows), dv_uncond = empty_like_sizes(uncond);
  GuidancePass pass = guidance_pass(rows, uncond, guidance, rescale);
  require_size(up, v.numel(), "gradient");
  pass.upstream = up.const_data_ptr<float>(), pass.dv = dv.data_ptr(), pass.dv_uncond = dv_uncond.data_ptr();
  run(pass);
  return {dv.to(v.scalar_type()), dv_uncond.to(v_uncond.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(aot_fast_cpu, CompositeImplicitAutograd, library) { library.impl("scored_step", scored_step); }

TORCH_LIBRARY_IMPL(aot_fast_cpu, CPU, library) {
  library.impl("flow_step", flow_step);
  library.impl("flow_logp", flow_logp);
  library.impl("flow_logp_gradient", flow_logp_gradient);
  library.impl("guided_velocity", guided_velocity);
  library.impl("guided_velocity_gradient", guided_velocity_gradient);
}

}  // namespace aot
