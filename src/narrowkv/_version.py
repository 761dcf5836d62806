"""The version of this package, below everything that imports it."""

__version__ = "0.1.0"
