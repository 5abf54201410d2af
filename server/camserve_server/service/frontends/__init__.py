"""Front ends: processes that accept connections, decode images and encode responses for the engine process."""
