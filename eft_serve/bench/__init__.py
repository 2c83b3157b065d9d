"""Benchmarks: a table for people, one last line of JSON."""
