"""Many runs: the engines that start them, each in a process of its own, and the table of what they gave."""
