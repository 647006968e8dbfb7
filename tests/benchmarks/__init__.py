"""Benchmarks: skipped in the default test run, see the README for the command."""
