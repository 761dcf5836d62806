"""Quantizers of other people's methods, written from their papers and their code in plain torch, for `benchmarks.peers`."""
