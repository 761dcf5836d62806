"""The version of this package, below everything that imports it."""

__version__ = "0.2.0"
