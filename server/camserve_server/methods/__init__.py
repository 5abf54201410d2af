"""One paper a file. A file holds equations; it asks, and the engine answers."""
