"""The gRPC service. Only this package imports grpc and protobuf."""
