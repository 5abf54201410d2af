"""Load reports, which gRPC clients use to prefer the replicas that owe less work."""
