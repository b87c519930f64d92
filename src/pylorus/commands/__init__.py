"""The commands of `pylorus`: each says what it takes, and hands over."""
