def instruction_sets() -> list[str]:
    """Names of the vector instruction sets of this processor that kernels can use, weakest first."""
