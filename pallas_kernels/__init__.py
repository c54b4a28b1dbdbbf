"""Kernels: pure functions of arrays, one folder an operation. Imports jax and nothing of jaxserve."""
