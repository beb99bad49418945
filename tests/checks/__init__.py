"""Tensors, derivatives and comparisons that several files of tests use."""
