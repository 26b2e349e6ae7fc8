// CPU implementations of the operators. Their schemas, fakes and autograd rules are in mla_fast/ops/, which is the same
// with and without this extension; those for CUDA are in kernels/ (Triton) and csrc/cuda/ (dispatch).
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(mla_fast, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&mla_fast::linear_cross_entropy));
  m.impl("rls_project_", TORCH_BOX(&mla_fast::rls_project_));
  m.impl("rls_fold_", TORCH_BOX(&mla_fast::rls_fold_));
  m.impl("window_project", TORCH_BOX(&mla_fast::window_project));
  m.impl("window_step_", TORCH_BOX(&mla_fast::window_step_));
  m.impl("entropy_fusion", TORCH_BOX(&mla_fast::entropy_fusion));
  m.impl("entropy_fusion_backward", TORCH_BOX(&mla_fast::entropy_fusion_backward));
  m.impl("dispatch_plan", TORCH_BOX(&mla_fast::dispatch_plan));
  m.impl("pack_rows", TORCH_BOX(&mla_fast::pack_rows));
  m.impl("pack_features", TORCH_BOX(&mla_fast::pack_features));
  m.impl("unpack_rows", TORCH_BOX(&mla_fast::unpack_rows));
  m.impl("segment_mean", TORCH_BOX(&mla_fast::segment_mean));
}

#include <Python.h>

// Loading this module registers the implementations above; it has no Python names of its own.
PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
