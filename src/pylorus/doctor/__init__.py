"""`pylorus doctor`: check this machine for what Pylorus needs and say how to fix it. No check opens a connection."""
