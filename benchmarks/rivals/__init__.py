"""Training steps of other projects and of ours on the same rows, each in an environment of its own: benchmarks/README.md."""
