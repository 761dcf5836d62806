"""Tasks whose answers are right or wrong, on real models, by recipe: see `python -m benchmarks.tasks --help`."""
