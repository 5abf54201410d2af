"""The Open Inference Protocol: messages, stubs, and a client for models that another server runs.

Importing the stubs registers the protobuf package "inference". The packages tritonclient and kserve register it, too,
and one process cannot contain two of them. Therefore the stubs are imported only where they are needed.
"""

SERVICE = "inference.GRPCInferenceService"
