"""The package's version, the one place that states it. Knows nothing else, so that the build can read it without torch."""

__version__ = "0.1.0"
