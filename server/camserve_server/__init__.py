"""The server: plans yield queries, and one engine for each device answers them in batches."""
