"""camserve as an application of Ray Serve.

Each replica runs an ordinary camserve server (`replica.py`), to which Serve's gRPC proxies pass calls on (`proxy.py`).
Serve tells the proxies which replicas there are (`routing.py`).
"""
