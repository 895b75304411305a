// For operators that differentiate themselves: they call registered operators, so that tracing sees these.

#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

namespace aot {

using torch::autograd::variable_list;
using Context = torch::autograd::AutogradContext;

// The registered operator of that name, whose C++ function has the type F.
template <class F>
auto operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

}  // namespace aot
