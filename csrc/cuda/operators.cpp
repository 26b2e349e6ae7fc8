// The CUDA implementations of the dispatch operators, as torch sees them: arguments checked, results allocated, kernels launched on
// torch's current stream. No function here waits for the device, so all of them may be captured in a CUDA graph. Of what is on
// the device, indices included, nothing can be checked here; the kernels read and write no row that is not there.
#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace mla_fast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A binary that is built where torch is for the CPU alone cannot link libtorch_cuda; where there is a CUDA tensor it is loaded.
cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get, "mla_fast: libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Calls kernel(stream) on the device and current stream of `like`.
template <class Kernel>
void launch(const char* op, const Tensor& like, const Kernel& kernel) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  // Torch's runtime is not ours, which is linked statically, and need not have told ours of the device.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = kernel(current_stream(device));
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code, aoti_torch_device_type_cuda(),
      like.get_device_index(), &handle));
  return Tensor(handle);
}

int64_t* integers(const Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); }

template <class... Name>
void check_device(const char* op, const Tensor& t, const Tensor& like, const Name&... name) {
  STD_TORCH_CHECK(
      t.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name..., " must be on cuda:",
      like.get_device_index());
}

// `t`, contiguous, which must be int64 of this many elements (any if −1).
Tensor indices(const char* op, const char* name, const Tensor& t, const Tensor& like, int64_t size) {
  check_device(op, t, like, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, op, ": ", name, " must be int64");
  STD_TORCH_CHECK(size < 0 || t.numel() == size, op, ": ", name, " must have ", size, " elements, not ", t.numel());
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Whether each row is contiguous; the rows themselves may lie anywhere.
bool has_contiguous_rows(const Tensor& t) {
  int64_t stride = 1;
  for (int64_t d = t.dim() - 1; d > 0; --d) {
    if (t.size(d) != 1 && t.stride(d) != stride) return false;
    stride *= t.size(d);
  }
  return true;
}

// The copy of rows of `from` to a new tensor of to_rows rows, which is appended to `results`; `from` is made to have contiguous rows.
CopyItem copy_item(Tensor& from, int64_t to_rows, int64_t first_tile, std::vector<Tensor>& results) {
  if (!has_contiguous_rows(from)) from = torch::stable::contiguous(from);
  std::vector<int64_t> sizes(from.sizes().begin(), from.sizes().end());
  sizes[0] = to_rows;
  results.push_back(empty(from, sizes, from.scalar_type()));
  int64_t row_bytes = static_cast<int64_t>(from.element_size());
  for (size_t d = 1; d < sizes.size(); ++d) row_bytes *= sizes[d];
  CopyItem item{};
  item.from = static_cast<const char*>(from.const_data_ptr());
  item.to = static_cast<char*>(results.back().mutable_data_ptr());
  item.from_rows = from.size(0);
  item.to_rows = to_rows;
  item.stride = item.from_rows > 1 ? from.stride(0) * static_cast<int64_t>(from.element_size()) : row_bytes;
  item.first_tile = first_tile;
  item.width = width_log2(reinterpret_cast<uint64_t>(item.from), reinterpret_cast<uint64_t>(item.to), item.stride, row_bytes);
  item.vectors = row_bytes >> item.width;
  item.magic = item.vectors ? row_magic(item.vectors) : 0;
  return item;
}

using Launcher = cudaError_t (*)(const RowCopy&, int64_t, cudaStream_t);

// The copies of all modalities, to_rows[m] rows each, in one launch for every COPY_ITEMS of them.
std::vector<Tensor> copy_rows(
    const char* op, Launcher launcher, std::vector<Tensor>& inputs, const std::vector<int64_t>& to_rows, const Tensor& index,
    const Tensor& offsets) {
  std::vector<Tensor> results;
  const int M = static_cast<int>(inputs.size());
  for (int first = 0; first < M; first += COPY_ITEMS) {
    RowCopy copy{};
    copy.count = std::min(M - first, COPY_ITEMS);
    copy.first = first;
    copy.M = M;
    copy.index = integers(index);
    copy.index_size = index.numel();
    copy.offsets = integers(offsets);
    int64_t tiles = 0;
    for (int i = 0; i < copy.count; ++i) {
      const CopyItem item = copy_item(inputs[first + i], to_rows[first + i], tiles, results);
      copy.items[i] = item;
      tiles += divide_up(item.to_rows * item.vectors, COPY_TILE);
    }
    STD_TORCH_CHECK(tiles <= INT32_MAX, op, ": too many bytes for one launch");
    if (tiles > 0) launch(op, index, [&](cudaStream_t stream) { return launcher(copy, tiles, stream); });
  }
  return results;
}

// The number of samples: slot must be [N, M] for the M tensors.
int64_t samples(const char* op, const Tensor& slot, const char* name, const std::vector<Tensor>& tensors) {
  const int64_t M = static_cast<int64_t>(tensors.size());
  STD_TORCH_CHECK(slot.is_cuda(), op, ": slot must be on a CUDA device");
  STD_TORCH_CHECK(slot.dim() == 2 && slot.size(1) == M, op, ": slot must be [N, ", M, "]");
  for (int64_t m = 0; m < M; ++m) {
    check_device(op, tensors[m], slot, name, "[", m, "]");
    STD_TORCH_CHECK(tensors[m].dim() > 0, op, ": ", name, "[", m, "] must have rows, not be a scalar");
  }
  return slot.size(0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dispatch_plan_op(Tensor present, bool padded) {
  STD_TORCH_CHECK(present.is_cuda(), "dispatch_plan: present must be on a CUDA device");
  STD_TORCH_CHECK(present.scalar_type() == ScalarType::Bool && present.dim() == 2, "dispatch_plan: present must be bool [N, M]");
  const int64_t N = present.size(0), M = present.size(1);
  STD_TORCH_CHECK(0 < M && M <= MAX_MODALITIES, "dispatch_plan: present must have 1 to ", MAX_MODALITIES, " columns, not ", M);
  if (!present.is_contiguous()) present = torch::stable::contiguous(present);
  const Tensor rows = empty(present, {N * M}, ScalarType::Long), offsets = empty(present, {M + 1}, ScalarType::Long);
  const Tensor counts = empty(present, {M}, ScalarType::Long), slot = empty(present, {N, M}, ScalarType::Long);
  const Plan plan{
      static_cast<const uint8_t*>(present.const_data_ptr()), N, static_cast<int>(M), padded, integers(rows), integers(offsets),
      integers(counts), integers(slot)};
  launch("dispatch_plan", present, [&](cudaStream_t stream) { return dispatch_plan(plan, stream); });
  return {rows, offsets, counts, slot};
}

std::vector<Tensor> pack_rows_op(
    std::vector<Tensor> inputs, Tensor rows, Tensor offsets, Tensor slot, std::vector<int64_t> sizes) {
  const int64_t M = static_cast<int64_t>(inputs.size());
  const int64_t N = samples("pack_rows", slot, "inputs", inputs);
  STD_TORCH_CHECK(static_cast<int64_t>(sizes.size()) == M, "pack_rows: sizes must have ", M, " elements");
  for (int64_t m = 0; m < M; ++m) {
    STD_TORCH_CHECK(inputs[m].size(0) == N, "pack_rows: inputs[", m, "] must have ", N, " rows, not ", inputs[m].size(0));
    STD_TORCH_CHECK(sizes[m] >= 0, "pack_rows: sizes[", m, "] must not be negative, but is ", sizes[m]);
  }
  rows = indices("pack_rows", "rows", rows, slot, N * M);
  offsets = indices("pack_rows", "offsets", offsets, slot, M + 1);
  return copy_rows("pack_rows", pack_rows, inputs, sizes, rows, offsets);
}

std::vector<Tensor> unpack_rows_op(std::vector<Tensor> packed, Tensor slot, Tensor offsets) {
  const int64_t M = static_cast<int64_t>(packed.size());
  const int64_t N = samples("unpack_rows", slot, "packed", packed);
  slot = indices("unpack_rows", "slot", slot, slot, N * M);
  offsets = indices("unpack_rows", "offsets", offsets, slot, M + 1);
  return copy_rows("unpack_rows", unpack_rows, packed, std::vector<int64_t>(M, N), slot, offsets);
}

Floating floating(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return Floating::float64;
    case ScalarType::Float: return Floating::float32;
    case ScalarType::Half: return Floating::float16;
    case ScalarType::BFloat16: return Floating::bfloat16;
    default: STD_TORCH_CHECK(false, "segment_mean: features must be float32, float64, bfloat16 or float16");
  }
}

Tensor segment_mean_op(Tensor features, Tensor offsets, std::optional<Tensor> counts) {
  STD_TORCH_CHECK(features.is_cuda(), "segment_mean: features must be on a CUDA device");
  STD_TORCH_CHECK(features.dim() == 2, "segment_mean: features must be [K, s]");
  const Floating dtype = floating(features.scalar_type());
  offsets = indices("segment_mean", "offsets", offsets, features, -1);
  const int64_t K = features.size(0), s = features.size(1), M = offsets.numel() - 1;
  STD_TORCH_CHECK(M >= 0, "segment_mean: offsets must be [M + 1]");
  if (counts) counts = indices("segment_mean", "counts", *counts, features, M);
  if (!has_contiguous_rows(features)) features = torch::stable::contiguous(features);
  const Tensor means = empty(features, {M, s}, dtype == Floating::float64 ? ScalarType::Double : ScalarType::Float);
  STD_TORCH_CHECK(M * divide_up(s, 4) <= INT32_MAX, "segment_mean: too many means for one launch");
  if (M == 0 || s == 0) return means;

  const int64_t bytes = static_cast<int64_t>(features.element_size()), stride = K > 1 ? features.stride(0) : s;
  const void* data = features.const_data_ptr();
  const bool vectorized = width_log2(reinterpret_cast<uint64_t>(data), 0, stride * bytes, s * bytes) == 4;
  const SegmentMean mean{data, integers(offsets), counts ? integers(*counts) : nullptr, means.mutable_data_ptr(), K, s, stride, M};
  launch("segment_mean", features, [&](cudaStream_t stream) { return segment_mean(mean, dtype, vectorized, stream); });
  return means;
}

}  // namespace
}  // namespace mla_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(mla_fast, CUDA, m) {
  m.impl("dispatch_plan", TORCH_BOX(&mla_fast::cuda::dispatch_plan_op));
  m.impl("pack_rows", TORCH_BOX(&mla_fast::cuda::pack_rows_op));
  m.impl("unpack_rows", TORCH_BOX(&mla_fast::cuda::unpack_rows_op));
  m.impl("segment_mean", TORCH_BOX(&mla_fast::cuda::segment_mean_op));
}

// Loading this module registers the implementations above; it has no Python names of its own.
PyMODINIT_FUNC PyInit__C_cuda(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
