"""The web page: a bundle behind a small web server of its own. It downloads nothing and stores no uploaded image."""
