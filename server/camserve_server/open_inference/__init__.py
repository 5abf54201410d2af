"""The Open Inference Protocol: messages, stubs, and a client for models that another server runs."""
