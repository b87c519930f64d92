"""What is wrong with an image set: looked for before anything is trained on it."""
