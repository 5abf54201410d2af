"""The server: plans ask the model questions, one engine a device answers them in full batches."""
