// What every file of operators needs: tensors as blocks of floats, whatever their type.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "isa.h"

namespace aot {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void require_float(at::ScalarType type) {
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "dtype: given ", type, ", expected float32, bfloat16 or float16");
}

// Numbers of one of the float types; null where a tensor was not given.
struct Numbers {
  const void* data = nullptr;
  at::ScalarType type = at::kFloat;
  int64_t row_stride = 0;  // elements between rows (samples), whose own elements lie side by side

  Numbers() = default;
  explicit Numbers(const Tensor& t) : data(t.const_data_ptr()), type(t.scalar_type()), row_stride(t.dim() ? t.stride(0) : 0) {
    require_float(type);
  }
  explicit Numbers(const OptionalTensor& t) : Numbers(t ? Numbers(*t) : Numbers()) {}
  explicit operator bool() const { return data != nullptr; }
};

// Whether the elements of each row, t[i], lie side by side.
inline bool has_dense_rows(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d > 0; --d) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// The tensor as the kernels read it: not fp64, with dense rows. No copy where it is so already.
inline Tensor readable(const Tensor& t) {
  Tensor narrow = t.scalar_type() == at::kDouble ? t.to(at::kFloat) : t;
  return has_dense_rows(narrow) ? narrow : narrow.contiguous();
}

inline OptionalTensor readable(const OptionalTensor& t) { return t ? OptionalTensor(readable(*t)) : t; }

// [N] as the kernels read it: one number after the other.
inline Tensor row_of(const Tensor& t) { return (t.scalar_type() == at::kDouble ? t.to(at::kFloat) : t).contiguous(); }

inline OptionalTensor row_of(const OptionalTensor& t) { return t ? OptionalTensor(row_of(*t)) : t; }

// The operators are also called without the checks of their public functions: what is too short would be read beyond its end.
inline void require_size(const Tensor& t, int64_t size, const char* name) {
  TORCH_CHECK(t.numel() == size, name, ": given ", t.numel(), " numbers, expected ", size);
}

inline void require_size(const OptionalTensor& t, int64_t size, const char* name) {
  if (t) require_size(*t, size, name);
}

inline void require_shape(const OptionalTensor& t, const Tensor& like, const char* name) {
  if (t) TORCH_CHECK(t->sizes() == like.sizes(), name, ": given shape ", t->sizes(), ", expected ", like.sizes());
}

inline const bool* flags(const OptionalTensor& t) { return t ? t->const_data_ptr<bool>() : nullptr; }

// A loop over units of a size, with about 32,768 numbers a task at least. Which thread runs a unit shows in no result.
template <class F>
void parallel(int64_t units, int64_t unit_size, const F& f) {
  at::parallel_for(0, units, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, unit_size)), f);
}

}  // namespace aot
