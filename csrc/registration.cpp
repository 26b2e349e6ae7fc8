// Schemas and CPU implementations of the operators. Fakes and autograd rules are added from Python (mla_fast/ops.py),
// CUDA implementations by mla_fast.kernels.
#include "ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(mla_fast, m) {
  m.def(
      "rls_project_(Tensor(a!) P, Tensor x_bar, Tensor grad, Tensor alpha, Tensor(b!)? pending=None, "
      "Tensor? found_inf=None, bool project_first=False) -> Tensor");
  m.def("rls_fold_(Tensor(a!) P, Tensor(b!) pending) -> ()");
  m.def("window_project(Tensor means, Tensor grad, Tensor alpha) -> Tensor");
  m.def("entropy_fusion(Tensor[] logits, Tensor? present) -> (Tensor, Tensor, Tensor)");
  m.def(
      "entropy_fusion_backward(Tensor[] logits, Tensor? present, Tensor weights, Tensor entropy, Tensor? grad_fused, "
      "Tensor? grad_weights, Tensor? grad_entropy) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(mla_fast, CPU, m) {
  m.impl("rls_project_", TORCH_BOX(&mla_fast::rls_project_));
  m.impl("rls_fold_", TORCH_BOX(&mla_fast::rls_fold_));
  m.impl("window_project", TORCH_BOX(&mla_fast::window_project));
  m.impl("entropy_fusion", TORCH_BOX(&mla_fast::entropy_fusion));
  m.impl("entropy_fusion_backward", TORCH_BOX(&mla_fast::entropy_fusion_backward));
}

#include <Python.h>

// Loading this module registers the operators above; it has no Python names of its own.
PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
