"""Tests of the explainer for KServe.

It runs in processes of its own, because its SDK registers the same protobuf messages as the server.
"""
