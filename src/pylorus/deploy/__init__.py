"""A trained model outside its run: so far the bundle, a folder that holds all that a prediction needs."""
