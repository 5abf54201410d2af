"""camserve as an application of Ray Serve.

Each replica runs an ordinary camserve server. The path of a call: Serve's gRPC proxy (`proxy.py`), a replica that
Serve selects (`routing.py`), and the server of that replica on a private Unix socket (`replica.py`).
"""
