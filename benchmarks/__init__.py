"""Timings beside other code, in one process. Tables: benchmarks/README.md."""
