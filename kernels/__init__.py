"""Triton kernels, installed as ``mla_fast.kernels``: the CUDA implementations of the operators in csrc/registration.cpp.

None are here yet; ``mla_fast.ops`` sends CUDA tensors to the reference arithmetic until they are.
"""
