// The operators' schemas: those that the Triton operators have in the namespace aot_fast (tests compare them word for word); and two that
// differentiate them, policy_loss and scored_step, for which Triton's operators have functions in Python.

#include <torch/library.h>

#include <cstdlib>
#include <string>

#include "isa.h"

namespace aot {
namespace {

Isa best_isa() {
  const char* asked = std::getenv("AOT_FAST_ISA");
  std::string limit = asked ? asked : "";
  TORCH_CHECK(limit.empty() || limit == "baseline" || limit == "avx2" || limit == "avx512", "AOT_FAST_ISA: given '", limit,
              "', expected 'baseline', 'avx2' or 'avx512'");
#if AOT_X86
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl");
  if (avx512 && (limit.empty() || limit == "avx512")) return Isa::avx512;
  if (avx2 && limit != "baseline") return Isa::avx2;
#endif
  return Isa::baseline;
}

std::string isa_name() { return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "baseline"; }

}  // namespace

Isa isa() {
  static const Isa found = best_isa();
  return found;
}

TORCH_LIBRARY(aot_fast_cpu, library) {
  library.def("isa() -> str", isa_name);
  library.def("row_stats(Tensor logits, Tensor targets, float temperature) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "logit_gradient(Tensor logits, Tensor targets, Tensor logp, Tensor entropy, Tensor valid, Tensor highest, Tensor log_sum, "
      "Tensor? dlogp, Tensor? dentropy, float temperature, ScalarType dtype) -> Tensor");
  library.def(
      "logit_gradient_in_place(Tensor(a0!) logits, Tensor targets, Tensor logp, Tensor entropy, Tensor valid, Tensor highest, "
      "Tensor log_sum, Tensor dlogp, Tensor? dentropy, float temperature, ScalarType dtype) -> ()");
  library.def("group_advantage(Tensor rewards, Tensor sizes, float eps, str std, SymInt ddof) -> (Tensor, Tensor, Tensor)");
  library.def(
      "policy_loss_forward(Tensor logp, Tensor? entropy, Tensor advantages, Tensor? old, Tensor? ref, Tensor? mask, Tensor? valid, "
      "Tensor? seq_ids, Tensor? weight, Tensor? number, float? fixed, float divisor, str loss, str kl, str agg, float ratio_low, "
      "float ratio_high, float? dual_clip, float? beta, float? entropy_coef) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "policy_loss(Tensor logp, Tensor? entropy, Tensor advantages, Tensor? old, Tensor? ref, Tensor? mask, Tensor? valid, "
      "Tensor? seq_ids, Tensor? weight, Tensor? number, float? fixed, float divisor, str loss, str kl, str agg, float ratio_low, "
      "float ratio_high, float? dual_clip, float? beta, float? entropy_coef) -> (Tensor, Tensor)");
  library.def(
      "policy_loss_backward(Tensor gradient, Tensor bonus, Tensor scale, Tensor upstream, ScalarType dtype, ScalarType bonus_dtype) -> "
      "(Tensor, Tensor)");
  library.def(
      "flow_step(Tensor x, Tensor v, Tensor? v_uncond, Tensor? noise, Tensor? seeds, Tensor[] step, float guidance, bool rescale, "
      "bool published, ScalarType storage) -> (Tensor, Tensor)");
  library.def(
      "flow_logp(Tensor x, Tensor v, Tensor? v_uncond, Tensor x_next, Tensor? v_ref, Tensor? v_old, Tensor[] step, float guidance, "
      "bool rescale, bool published, bool flow_grpo_kl) -> (Tensor, Tensor, Tensor)");
  library.def(
      "scored_step(Tensor x, Tensor v, Tensor? v_uncond, Tensor x_next, Tensor? v_ref, Tensor? v_old, Tensor[] step, float guidance, "
      "bool rescale, bool published, bool flow_grpo_kl) -> (Tensor, Tensor, Tensor)");
  library.def(
      "flow_logp_gradient(Tensor x, Tensor v, Tensor? v_uncond, Tensor x_next, Tensor? v_ref, Tensor? v_old, Tensor[] step, "
      "Tensor? dlogp, Tensor? dkl, Tensor? ddrift, float guidance, bool rescale, bool published, bool flow_grpo_kl) -> (Tensor, Tensor)");
  library.def("guided_velocity(Tensor v, Tensor v_uncond, float guidance, bool rescale) -> Tensor");
  library.def("guided_velocity_gradient(Tensor v, Tensor v_uncond, Tensor gradient, float guidance, bool rescale) -> (Tensor, Tensor)");
  library.def(
      "flow_policy_loss(Tensor logp, Tensor old, Tensor advantages, Tensor? kl, Tensor? drift, Tensor? std, Tensor? dt, Tensor? mask, "
      "Tensor? number, float? fixed, float clip, float? beta, float tau, float adv_clip, str variant) -> (Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace aot
