"""The version of this package, here so that every stage can write it down without looking upward."""

__version__ = "0.1.0"
