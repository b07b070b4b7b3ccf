"""Benchmarks: outside pytest, warmed up, JSON with machine, versions and commit under benchmarks/results/."""
