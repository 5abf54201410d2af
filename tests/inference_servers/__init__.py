"""Models for real servers of the Open Inference Protocol, and calls of a real client.

These files run in the environments of the servers and of the client.
"""
