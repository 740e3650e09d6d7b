"""Leaf helpers that import nothing of the project: errors, environment fixes, files, seeds, tensors."""
