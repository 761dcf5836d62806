"""Encoders on a GPU, by kernels in Triton."""
