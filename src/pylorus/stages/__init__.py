"""A stage of training: from what it is served to what it leaves in its folder."""
