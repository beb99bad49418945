"""Implicit derivatives: the primitive, its linear operators, linear systems and roots."""
