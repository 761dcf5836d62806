"""Quantizers: a scheme with its tables, which encodes and dequantizes one tensor."""
