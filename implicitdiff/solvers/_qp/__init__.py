"""The methods of quadratic programs."""
