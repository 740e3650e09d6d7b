"""Timings against other code, in one process. Tables: benchmarks/README.md."""

import common.compat  # noqa: F401  (must come before transformers)
