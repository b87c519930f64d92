"""One stage of training, from its data to the files in its folder."""
