"""Oracles: slow and obvious ways to the same answers, for tests and benchmarks."""
