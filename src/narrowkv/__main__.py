"""`python -m narrowkv` is `narrowkv`, for launchers that want a module (torchrun -m narrowkv calibrate ...)."""

from narrowkv.cli.main import run

run()
