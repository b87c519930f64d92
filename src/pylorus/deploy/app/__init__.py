"""The page: a bundle behind a small web server of its own. Nothing is fetched, nothing uploaded is kept."""
