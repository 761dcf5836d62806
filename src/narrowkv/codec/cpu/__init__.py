"""Encoders on a CPU, compiled."""
