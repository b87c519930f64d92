"""What this machine has, what it lacks and how to mend it: `pylorus doctor`. No check opens a connection."""
