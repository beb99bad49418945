"""Closure conversion: a user's function as a pure function of explicit operands."""
