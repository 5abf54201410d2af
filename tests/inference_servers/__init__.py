"""Models for real servers of the Open Inference Protocol. Their files run in the environments of these servers."""
