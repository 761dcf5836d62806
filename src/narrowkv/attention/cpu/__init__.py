"""Attention on a CPU, compiled."""
