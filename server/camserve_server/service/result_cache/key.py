"""The keys of stored responses.

A key is a SHA-256 of everything on which a response depends. What is not known to be without effect is part of the key:
a difference that does not matter costs a computation, and a missing one would give a wrong response.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import PIL.features
import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from camserve.v1 import explain_pb2 as pb
from camserve_server.config import Config, ModelConfig
from camserve_server.models.model import LaneKind, Model
from camserve_server.models.structure import structure
from camserve_server.service.requests import ParsedRequest
from camserve_server.service.responses import struct
from camserve_server.torch_setup.machine import machine_facts

Request = pb.ExplainRequest | pb.EvaluateRequest
M = TypeVar("M", bound=Message)


def digested(message: M) -> M:
    """Return a copy of a message in which digests replace the values of fields of type bytes: images, maps and masks.

    The copy keeps fields that this version does not know. The message may contain digests already.

    Args:
        message: The request.
    """
    copy = type(message)()
    copy.CopyFrom(message)
    _replace_data(copy)
    return copy


def _replace_data(message: Message) -> None:
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_BYTES:
            setattr(message, field.name, hashlib.sha256(value).digest())
        elif isinstance(value, Message):
            _replace_data(value)


class Keys:
    """Computes the keys of one server. Create it when the server has set the number of threads of torch.

    Args:
        config: The configuration of the server.
        device: The device of its models.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._server = _json(
            {
                "batch_invariant": config.batch_invariant,
                "max_image_pixels": config.max_image_pixels,
                **_versions(),
                **machine_facts(device),
            }
        )

    def key(
        self,
        request: Request,
        parsed: ParsedRequest,
        settings: ModelConfig,
        batch_sizes: Mapping[LaneKind, int],
        kind: str,
        owner: Sequence[str],
    ) -> bytes:
        """Return the key of the response to a request.

        Args:
            request: The message of the caller.
            parsed: Its checked fields.
            settings: The configuration of the model.
            batch_sizes: The batch size of each kind of lane.
            kind: The full name of the message that is stored.
            owner: The caller; empty if callers share their responses.
        """
        digest = hashlib.sha256()
        parts = (
            self._server,
            request.DESCRIPTOR.full_name.encode(),
            kind.encode(),
            _json(owner),
            settings.model_dump_json().encode(),
            _model_facts(parsed.model),
            _json(batch_sizes),
            canonical(request, parsed),
        )
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest()


def canonical(request: Request, parsed: ParsedRequest) -> bytes:
    """Return a form of a request that is the same for requests which differ only in how they name the same thing.

    The form contains the digest of the image, and all parameters and layers of a method whether the request names them
    or they are defaults. It does not contain the identifier and the priority of the request.

    Args:
        request: The message of the caller.
        parsed: Its checked fields.
    """
    message = digested(request)
    message.ClearField("request_id")
    message.ClearField("priority")
    message.model, message.precision = parsed.model.name, parsed.model.precision
    if parsed.method is not None:
        message.method.parameters.CopyFrom(struct(parsed.method.parameters))
        message.method.layers[:] = [layer.name for layer in parsed.method.layers]
    for spec, call in zip(message.metrics, parsed.metrics, strict=True):
        spec.parameters.CopyFrom(struct(call.parameters))
    if isinstance(message, pb.ExplainRequest) and not isinstance(parsed.targets, int):
        for target, index in zip(message.targets, parsed.targets, strict=True):
            target.index = index
    elif isinstance(message, pb.EvaluateRequest) and not isinstance(parsed.targets, int):
        message.target.index = parsed.targets[0]
    return message.SerializeToString(deterministic=True)


_facts: WeakKeyDictionary[Model, bytes] = WeakKeyDictionary()


def _model_facts(model: Model) -> bytes:
    """Return what a response depends on beside the settings of the model, such as the contents of the named files."""
    facts = _facts.get(model)
    if facts is None:
        facts = _facts[model] = _json(
            {
                "digest": model.digest,
                "code": model.code,
                "network": structure(model.module),
                "channels_last": model.channels_last,
                "one_row": model.one_row,
                "fast_forward": model.fast_forward_size if model.fast_forward else 0,
                "compiled": model.compiled,
                "head": model.head,
                "labels": model.labels,
                "preprocessing": str(model.preprocessing),
                "precision": model.precision,
                "device": model.device.type,
            }
        )
    return facts


def _versions() -> dict[str, object]:
    """Return the versions of all installed packages, because methods and networks can come from any of them."""
    packages = sorted((each.name or "", each.version) for each in metadata.distributions())
    images = {name: PIL.features.version(name) for name in ("jpg", "libjpeg_turbo", "zlib", "webp", "libtiff")}
    return {"python": platform.python_version(), "packages": packages, "images": images}


def _json(value: Mapping[Any, object] | Iterable[object]) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
