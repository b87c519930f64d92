"""A run as its user meets it: its folder, how it ends, what befalls it, and how it goes on."""
