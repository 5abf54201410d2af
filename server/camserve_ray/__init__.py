"""camserve on a Ray cluster."""
