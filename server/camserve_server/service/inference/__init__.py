"""The Open Inference Protocol for callers: explanations for clients of Triton, KServe and other model servers."""
