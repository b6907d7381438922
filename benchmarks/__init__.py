"""Figures that anyone can repeat: each module is one command that measures and writes to `benchmarks/results/`."""
