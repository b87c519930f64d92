"""A package outside Pylorus, as in docs/extending.md: one example of each extension."""
