"""Models: where they come from, what their layers are, how pixels become their input."""
