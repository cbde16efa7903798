"""A tiny pair and a prompt file, as the benchmarks have them."""

from tests.benchmarks.conftest import files as files
