"""Client for operators: load, unload and reload models of a running server."""

from __future__ import annotations

from typing import Any, ClassVar

import grpc

from camserve import catalogue, errors, request_messages
from camserve.catalogue import Model
from camserve.connection import BlockingConnection
from camserve.v1 import admin_pb2 as pb
from camserve.v1 import explain_pb2
from camserve.v1.admin_pb2_grpc import AdminServiceStub

__all__ = ["Admin"]


class Admin(BlockingConnection):
    """Blocking client of the server's admin listener (`admin_listen` in the server's configuration).

    The arguments are those of `Client`. If the server requires tokens, `token` must belong to an admin. The server
    reads its configuration file again for each call, so `model` may name a model that was added to the file after the
    server started. Loading a large model can take longer than the default `timeout`. Close the client when it is no
    longer needed, preferably with a `with` statement.
    """

    _stub: ClassVar[Any] = AdminServiceStub

    def load(self, model: str) -> Model:
        """Load a model and warm it up.

        Args:
            model: Name of the model in the server's configuration file.

        Returns:
            The model, which now serves requests.

        Raises:
            NotFound: The configuration file does not contain the model.
            FailedPrecondition: The model cannot be loaded; the message gives the reason.
            Unauthenticated: The server requires a token.
            PermissionDenied: The token does not belong to an admin.
            CamserveError: The call failed for another reason; see `camserve.errors` for all subclasses.
        """
        return self._load("LoadModel", pb.LoadModelRequest(model=model))

    def unload(self, model: str) -> None:
        """Unload a model. Requests for it fail from now on; the method returns when all running requests are finished.

        Args:
            model: Name of the model in the server's configuration file.

        Raises:
            NotFound: The server has no such model.
            Unauthenticated: The server requires a token.
            PermissionDenied: The token does not belong to an admin.
            CamserveError: The call failed for another reason; see `camserve.errors` for all subclasses.
        """
        self._call("UnloadModel", pb.UnloadModelRequest(model=model))

    def reload(self, model: str) -> Model:
        """Load a model again and replace the running one without interruption.

        The running model serves requests until the new one is ready. If the new model cannot be loaded, the running
        model stays. The method returns when all requests on the old model are finished.

        Args:
            model: Name of the model in the server's configuration file.

        Returns:
            The new model, which now serves requests.

        Raises:
            NotFound: The configuration file does not contain the model.
            FailedPrecondition: The model cannot be loaded; the message gives the reason.
            Unauthenticated: The server requires a token.
            PermissionDenied: The token does not belong to an admin.
            CamserveError: The call failed for another reason; see `camserve.errors` for all subclasses.
        """
        return self._load("ReloadModel", pb.ReloadModelRequest(model=model))

    def _load(self, rpc: str, request: Any) -> Model:
        (model,) = catalogue.models(explain_pb2.ListModelsResponse(models=[self._call(rpc, request).model]))
        return model

    def _call(self, rpc: str, request: Any) -> Any:
        call = request_messages.PreparedCall[Any](rpc, request, lambda response: response)
        channels = self._channels()
        try:
            return getattr(channels.stubs[1], rpc)(request, **self._call_options(call))
        except grpc.RpcError as error:
            if self._without_watch(channels, error):
                return self._call(rpc, request)
            translated = self._translate(error, call)
            if translated.code is grpc.StatusCode.UNIMPLEMENTED:
                remedy = "use the address of admin_listen in the server's configuration"
                translated = errors.CamserveError(f"{self.address} is not the server's admin listener; {remedy}")
            raise translated from error
        except ValueError as error:  # of gRPC, if the channel has been closed
            if not self._closed:
                raise
            raise errors.Cancelled("the client was closed while the call was in flight") from error
