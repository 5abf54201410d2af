"""What operators do to a running server: load, unload and reload models."""

from __future__ import annotations

from typing import Any

import grpc

from camserve import catalogue, errors, request_messages
from camserve.catalogue import Model
from camserve.connection import Connection
from camserve.v1 import admin_pb2 as pb
from camserve.v1 import explain_pb2
from camserve.v1.admin_pb2_grpc import AdminServiceStub

__all__ = ["Admin"]


class Admin(Connection):
    """A connection to the listener for operators, `admin_listen` in the server's configuration.

    To be closed, best by `with`. Options are those of `Client`; with tokens, it takes one of an admin. Models are named
    as in the server's configuration file, which is read anew for each call. Loading a large one takes longer than the
    default `timeout`.

    Every method raises a CamserveError: NotFound for a model that the file does not have, FailedPrecondition, which
    says why, for one that cannot be loaded, PermissionDenied and Unauthenticated.
    """

    def load(self, model: str) -> Model:
        """Load and warm a model; it is served once this returns."""
        return self._loaded("LoadModel", pb.LoadModelRequest(model=model))

    def unload(self, model: str) -> None:
        """Serve the model no more; returns when what runs on it is finished. Requests for it fail from now on."""
        self._asked("UnloadModel", pb.UnloadModelRequest(model=model))

    def reload(self, model: str) -> Model:
        """Load the model anew beside the one that is served, then serve the new one.

        Returns when what runs on the old one is finished. Where it fails, the old one is served on.
        """
        return self._loaded("ReloadModel", pb.ReloadModelRequest(model=model))

    def close(self) -> None:
        """Close the connection. Calls still under way are cancelled."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Admin:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _loaded(self, rpc: str, request: Any) -> Model:
        (model,) = catalogue.models(explain_pb2.ListModelsResponse(models=[self._asked(rpc, request).model]))
        return model

    def _asked(self, rpc: str, request: Any) -> Any:
        call = request_messages.Call[Any](rpc, request, lambda answer: answer)
        try:
            return getattr(AdminServiceStub(self._channels[1]), rpc)(request, **self._given(call))
        except grpc.RpcError as error:
            found = self._error(error, call)
            if found.code is grpc.StatusCode.UNIMPLEMENTED:
                raise errors.CamserveError(
                    f"{self.address} is not for operators: give the address that admin_listen has in the server's "
                    "configuration"
                ) from error
            raise found from error
