"""A trained model outside its run: the bundle, a folder with all that a prediction needs, and what is done with it."""
