"""The rows that the tests run over: a new solver, linear solver or optimizer is a row of its table."""
