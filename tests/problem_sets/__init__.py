"""The problems by which the field judges solvers, as tables.

A problem's functions take arrays of torch, NumPy or JAX: they call the library of their argument.
"""
