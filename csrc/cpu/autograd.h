// For operators that differentiate themselves: they call registered operators, so that tracing sees these.

#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

namespace aot {

using torch::autograd::variable_list;
using Context = torch::autograd::AutogradContext;

// Gradients are formed without a graph: a second derivative would silently be 0.
inline void refuse_twice(const variable_list& upstream) {
  for (const at::Tensor& t : upstream)
    TORCH_CHECK(!(t.defined() && t.requires_grad() && at::GradMode::is_enabled()),
                "trying to differentiate twice a function that is differentiable once");
}

// The registered operator of that name, whose C++ function has the type F.
template <class F>
auto operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

}  // namespace aot
