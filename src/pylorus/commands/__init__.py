"""The commands of `pylorus`: their arguments, and the functions that they call."""
