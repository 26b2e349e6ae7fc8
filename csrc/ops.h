// The CPU implementations of the operators whose schemas are in mla_fast/ops/. Arguments were checked there, in Python,
// where an error can name them; what is checked again here guards callers of torch.ops.mla_fast.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace mla_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    Tensor features,
    Tensor target,
    Tensor weight,
    std::optional<Tensor> bias,
    double total);

Tensor rls_project_(
    Tensor P,
    Tensor x_bar,
    Tensor grad,
    Tensor alpha,
    std::optional<Tensor> pending,
    std::optional<Tensor> slot,
    std::optional<Tensor> found_inf,
    bool project_first);

void rls_fold_(Tensor P, Tensor pending, std::optional<Tensor> slot);

Tensor window_project(Tensor means, Tensor grad, Tensor alpha);

Tensor window_step_(
    Tensor means,
    Tensor gram,
    int64_t own,
    Tensor x_bar,
    Tensor grad,
    Tensor alpha,
    std::optional<Tensor> found_inf);

std::tuple<Tensor, Tensor, Tensor> entropy_fusion(
    std::vector<Tensor> logits,
    std::optional<Tensor> present,
    std::optional<Tensor> slot);

std::vector<Tensor> entropy_fusion_backward(
    std::vector<Tensor> logits,
    std::optional<Tensor> present,
    Tensor weights,
    Tensor entropy,
    std::optional<Tensor> grad_fused,
    std::optional<Tensor> grad_weights,
    std::optional<Tensor> grad_entropy,
    std::optional<Tensor> slot);

std::tuple<Tensor, Tensor, Tensor, Tensor> dispatch_plan(Tensor present, bool padded);

std::vector<Tensor> pack_rows(std::vector<Tensor> inputs, Tensor rows, Tensor offsets, Tensor slot, std::vector<int64_t> sizes);

std::tuple<std::vector<Tensor>, std::vector<Tensor>> pack_features(
    std::vector<Tensor> features,
    Tensor rows,
    Tensor offsets,
    Tensor slot,
    std::vector<int64_t> sizes);

std::vector<Tensor> unpack_rows(std::vector<Tensor> packed, Tensor slot, Tensor offsets);

Tensor segment_mean(Tensor features, Tensor offsets, std::optional<Tensor> counts);

// The value of a tensor with one element.
template <typename T>
T scalar(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.numel() == 1, name, " must have one element");
  return *t.const_data_ptr<T>();
}

inline void check_matrix_pair(const char* op, const Tensor& x, const Tensor& grad, int64_t s) {
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(1) == s, op, ": grad must be [C, ", s, "]");
  STD_TORCH_CHECK(x.size(x.dim() - 1) == s, op, ": the feature means must have ", s, " columns");
  STD_TORCH_CHECK(x.scalar_type() == grad.scalar_type(), op, ": feature means and grad must have one dtype");
}

// An uninitialised contiguous tensor on the CPU. The shim's own call: the dispatcher's costs a microsecond, as much as the
// arithmetic at s = 64.
template <class... Sizes>
inline Tensor empty(ScalarType dtype, Sizes... sizes) {
  constexpr size_t dims = sizeof...(sizes);
  const std::array<int64_t, dims + 1> size{static_cast<int64_t>(sizes)..., 1};
  std::array<int64_t, dims + 1> stride{};
  stride[dims] = 1;
  for (size_t i = dims; i > 0; --i) stride[i - 1] = stride[i] * size[i];
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, size.data(), stride.data(), code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Calls f(begin, end) on ranges of n pieces that take one core `ns` each, on as many threads as that is worth. Waking a thread that
// sleeps took 35 µs on an EPYC and 110 µs on a Xeon (two virtual cores each, OMP_WAIT_POLICY=passive), so each gets 100 µs or more.
template <class F>
inline void in_parallel(int64_t n, double ns, const F& f) {
  constexpr double worth_a_thread = 100'000;
  if (static_cast<double>(n) * ns < 2 * worth_a_thread) return f(0, n);
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, static_cast<int64_t>(worth_a_thread / ns)), f);
}

}  // namespace mla_fast
