"""What made the figures of the README: one file an operator, all on benchmarks/harness.py."""
