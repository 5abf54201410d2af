"""One paper a file, as for methods."""
