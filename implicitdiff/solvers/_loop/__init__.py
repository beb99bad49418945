"""The loop that all solvers share: the problem, the equation, the stopping rule and the state."""
