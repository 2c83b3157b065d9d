"""Compiled for a CPU by numba: the inner loops of combining and sampling."""
