"""The edge: wire ↔ domain. The only folder that knows grpc and protobuf."""
