"""Oracles: slow and simple reference implementations, for tests and benchmarks."""
