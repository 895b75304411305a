// group_advantage (kernels/group_advantage.py), in fp64: rewards of 1e4 + {0, 1} lose three digits of their difference in fp32.

#include "common.h"

namespace aot {
namespace {

// Of the finite ones among some rewards.
struct Moments {
  int64_t count = 0;
  double mean = 0, squares = 0;  // sum of squared distances from the mean
  bool all_equal = true;

  Moments(const double* rewards, int64_t start, int64_t stop) {
    double first = 0, sum = 0;
    for (int64_t i = start; i < stop; ++i) {
      if (!std::isfinite(rewards[i])) continue;
      if (count++ == 0) first = rewards[i];
      all_equal = all_equal && rewards[i] == first;
      sum += rewards[i];
    }
    mean = sum / std::max<int64_t>(1, count);
    for (int64_t i = start; i < stop; ++i)
      if (std::isfinite(rewards[i])) squares += (rewards[i] - mean) * (rewards[i] - mean);
  }

  double deviation(int64_t ddof) const { return std::sqrt(squares / std::max<int64_t>(1, count - ddof)); }
};

std::tuple<Tensor, Tensor, Tensor> group_advantage(const Tensor& rewards_, const Tensor& sizes_, double eps, std::string_view std_kind,
                                                   int64_t ddof) {
  Tensor rewards = rewards_.to(at::kDouble).contiguous(), sizes = sizes_.contiguous();
  int64_t num_rewards = rewards.size(0), num_groups = sizes.size(0);
  const double* r = rewards.const_data_ptr<double>();
  Tensor values = at::zeros({num_rewards}, rewards.options().dtype(at::kFloat));
  Tensor degenerate = at::empty({num_groups}, sizes.options().dtype(at::kBool)), num_nonfinite = at::empty({}, sizes.options());
  Moments all(r, 0, num_rewards);
  *num_nonfinite.data_ptr<int64_t>() = num_rewards - all.count;
  float* out = values.data_ptr<float>();
  int64_t start = 0;
  for (int64_t group = 0; group < num_groups; ++group) {
    int64_t size = sizes.const_data_ptr<int64_t>()[group];
    TORCH_CHECK(size >= 0 && size <= num_rewards - start, "group_sizes: given sizes that add up to more than ", num_rewards, " rewards");
    int64_t stop = start + size;
    Moments own(r, start, stop);
    bool none = own.count < 2 || own.all_equal;
    degenerate.data_ptr<bool>()[group] = none;
    double scale = std_kind == "none" ? 1 : (std_kind == "batch" ? all : own).deviation(ddof) + eps;
    for (int64_t i = start; i < stop && !none; ++i)
      if (std::isfinite(r[i])) out[i] = (r[i] - own.mean) / scale;
    start = stop;
  }
  return {values, degenerate, num_nonfinite};
}

}  // namespace

TORCH_LIBRARY_IMPL(aot_fast_cpu, CPU, library) { library.impl("group_advantage", group_advantage); }

}  // namespace aot
