"""Everything on which a response depends changes its key; nothing else does."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.features
import pytest
import torch
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from camserve.v1 import explain_pb2 as pb
from camserve_server.config import Config, ModelConfig
from camserve_server.models.model import Model
from camserve_server.service import requests
from camserve_server.service.requests import ParsedRequest
from camserve_server.service.result_cache.key import Keys, Request, canonical, digested
from camserve_server.torch_setup import machine
from tests.nets import tiny_cnn
from tests.support import as_model

CPU = torch.device("cpu")
SETTINGS = ModelConfig(name="model", source="python:tests.nets:tiny_cnn")
TENSOR = pb.Tensor(shape=[8, 8], data=np.full((8, 8), 0.5, "<f4").tobytes())
METRIC = pb.MetricSpec(name="insertion")
TRUTH = pb.Truth(boxes=[pb.Box(right=1, bottom=1)], mask=TENSOR)
MODEL = as_model(tiny_cnn())


def method(**parameters: Any) -> pb.MethodSpec:
    spec = pb.MethodSpec(name="poly-cam", seed=3)
    spec.parameters.update(parameters)
    return spec


def image() -> pb.Image:
    return pb.Image(pixels=pb.Pixels(height=8, width=8, data=bytes(192)))


def explain(**fields: Any) -> pb.ExplainRequest:
    base: dict[str, Any] = {
        "model": "model",
        "image": image(),
        "method": method(),
        "targets": [pb.Target(index=2)],
        "metrics": [METRIC],
        "truth": TRUTH,
        "map_format": pb.MapFormat(dtype="uint8"),
        "batch_sizes": {"forward": 4},
    }
    return pb.ExplainRequest(**base | fields)


def evaluate(**fields: Any) -> pb.EvaluateRequest:
    base: dict[str, Any] = {
        "model": "model",
        "image": image(),
        "saliency": TENSOR,
        "target": pb.Target(index=2),
        "metrics": [METRIC],
        "truth": TRUTH,
        "map_format": pb.MapFormat(dtype="uint8"),
        "batch_sizes": {"forward": 4},
    }
    return pb.EvaluateRequest(**base | fields)


def parse(request: Request, model: Model = MODEL) -> ParsedRequest:
    if isinstance(request, pb.ExplainRequest):
        return requests.parse_explain(request, model, Config())
    return requests.parse_evaluate(request, model, Config())


def form(request: Request, model: Model = MODEL) -> bytes:
    return canonical(request, parse(request, model))


# ---- all fields ------------------------------------------------------------------------------------------------------

# The canonical form contains the checked values of these fields. The tests below change them in valid requests.
RESOLVED = {
    "model",
    "precision",
    "method.parameters",
    "method.layers",
    "metrics.parameters",
    "targets.index",
    "targets.label",
    "target.index",
    "target.label",
}
WITHOUT_EFFECT = {"request_id", "priority"}


def paths(kind: Descriptor, outside: str = "") -> Iterator[str]:
    """Yield the paths of all fields that are no messages, such as "image.pixels.height"."""
    for field in kind.fields:
        path = f"{outside}{field.name}"
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if field.message_type is None or is_map or path in RESOLVED:
            yield path
        else:
            yield from paths(field.message_type, f"{path}.")


def change(message: Any, path: str) -> None:
    """Change the value of a field; add an entry if it is repeated."""
    first, _, rest = path.partition(".")
    field: FieldDescriptor = message.DESCRIPTOR.fields_by_name[first]
    value = getattr(message, first)
    if rest:
        change(value[0] if isinstance(value, Sequence) and not isinstance(value, Message) else value, rest)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        value["gradient"] = 5
    elif hasattr(value, "append"):
        value.append(_another(field, None))
    else:
        setattr(message, first, _another(field, value))


def _another(field: FieldDescriptor, value: Any) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return (value or type(field.default_value)()) + (b"x" if field.type == field.TYPE_BYTES else "x")
        case FieldDescriptor.CPPTYPE_BOOL:
            return not value
        case _:
            return (value or 0) + 1


CASES = [(make, path) for make in (explain, evaluate) for path in paths(make().DESCRIPTOR) if path not in RESOLVED]


@pytest.mark.parametrize(("make", "path"), CASES, ids=[f"{make.__name__}-{path}" for make, path in CASES])
def test_each_field_changes_the_canonical_form(make: Callable[[], Request], path: str) -> None:
    """A field that is added to the contract is tested, too, without a change of this test."""
    request = make()
    parsed, before = parse(request), form(request)
    change(request, path)
    assert (canonical(request, parsed) == before) == (path in WITHOUT_EFFECT)


def test_walk_finds_fields_at_all_depths() -> None:
    found = {*paths(pb.ExplainRequest.DESCRIPTOR)}
    assert {"raw", "image.encoded", "image.pixels.data", "truth.boxes.left", "truth.mask.data", "batch_sizes"} <= found
    assert {"method.parameters", "targets.index", "map_format.native", "metrics.name"} <= found


@pytest.mark.parametrize("make", [explain, evaluate])
def test_unknown_fields_change_the_canonical_form(make: Callable[[], Request]) -> None:
    """A newer client can send fields that this version does not know."""
    request = make()
    newer = type(request).FromString(request.SerializeToString() + b"\xfa\x3e\x01x")  # field 1007
    assert canonical(newer, parse(request)) != form(request)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (explain(method=method()), explain(method=method(tolerance=0.1))),
        (explain(method=method()), explain(method=pb.MethodSpec(name="poly-cam", seed=3, layers=["r2"]))),
        (explain(), explain(metrics=[])),
        (explain(targets=[pb.Target(index=2)]), explain(targets=[pb.Target(index=3)])),
        (explain(targets=[pb.Target(index=2)]), explain(targets=[])),
        (evaluate(), evaluate(target=pb.Target(index=3))),
        (evaluate(), evaluate(saliency=None, method=method())),
    ],
)
def test_resolved_values_change_the_canonical_form(one: Request, other: Request) -> None:
    assert form(one) != form(other)


def test_parameters_of_metrics_change_the_canonical_form() -> None:
    other = pb.MetricSpec(name="insertion")
    other.parameters.update({"steps": 7})
    assert form(explain()) != form(explain(metrics=[other]))


def test_model_and_precision_change_the_canonical_form() -> None:
    request = explain()
    others = (replace(MODEL, name="other"), replace(MODEL, precision="bf16"))
    assert len({form(request), *(form(request, other) for other in others)}) == 3


def test_canonical_form_is_the_same_for_defaults_and_their_values() -> None:
    """A request that names the defaults, or a class by its label, is the same request."""
    labelled = replace(MODEL, labels=tuple("abcdefg"))
    full = method(**dict(parse(explain()).method.parameters))  # type: ignore[union-attr]  # the request has a method
    full.layers.extend(layer.name for layer in MODEL.layers)
    named = explain(model="", method=full, targets=[pb.Target(label="c")], request_id="r", priority="high")
    assert form(named, labelled) == form(explain(), labelled)


def test_data_are_digested() -> None:
    request = explain()
    copy = digested(request)
    assert len(copy.image.pixels.data) == len(copy.truth.mask.data) == 32
    assert len(request.image.pixels.data) == 192
    assert canonical(copy, parse(request)) != form(explain(image=pb.Image(encoded=bytes(192))))


# ---- the server, the model and the caller ----------------------------------------------------------------------------


def computed(
    request: Request | None = None,
    *,
    config: Config | None = None,
    settings: ModelConfig = SETTINGS,
    model: Model = MODEL,
    sizes: dict[Any, int] | None = None,
    kind: str = "kind",
    owner: Sequence[str] = (),
) -> bytes:
    request = request or explain()
    return Keys(config or Config(), CPU).key(
        request, parse(request, model), settings, sizes or {"forward": 4, "gradient": 2}, kind, owner
    )


def test_key_is_a_digest_that_does_not_depend_on_time_or_order() -> None:
    assert len(computed()) == 32
    assert computed() == computed(sizes={"gradient": 2, "forward": 4})


@pytest.mark.parametrize(
    "change",
    [
        {"config": Config(batch_invariant=False)},
        {"settings": SETTINGS.model_copy(update={"fold_batch_norm": False})},
        {"model": replace(MODEL, digest="sha256:other")},
        {"model": replace(MODEL, code="other")},
        {"model": replace(MODEL, labels=tuple("abcdefg"))},
        {"model": replace(MODEL, fast_forward=lambda x: x, fast_forward_size=4)},
        {"model": replace(MODEL, module=torch.nn.Sequential(MODEL.module))},
        {"sizes": {"forward": 8, "gradient": 2}},
        {"kind": "other"},
        {"owner": ("anna", "", "")},
        {"request": explain(raw=True)},
    ],
    ids=lambda change: str([*change]),
)
def test_key_depends_on(change: dict[str, Any]) -> None:
    assert computed(**change) != computed()


def test_configuration_of_a_network_changes_the_key() -> None:
    """The number of attention heads is neither in the weights nor in the modules."""

    def model(heads: int) -> Model:
        module: Any = copy.deepcopy(MODEL.module)
        module.config = SimpleNamespace(to_json_string=lambda: f"heads: {heads}")
        return replace(MODEL, module=module)

    two = computed(model=model(2))
    assert two == computed(model=model(2))
    assert two != computed(model=model(4))


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # about the type of the other value
def test_each_setting_of_a_model_changes_the_key() -> None:
    keys, parsed = Keys(Config(), CPU), parse(explain())
    each = [SETTINGS, *(SETTINGS.model_copy(update={name: "another value"}) for name in ModelConfig.model_fields)]
    made = {keys.key(explain(), parsed, settings, {"forward": 4}, "kind", ()) for settings in each}
    assert len(made) == len(each)


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (torch, "get_num_threads", lambda: 77),
        (torch.backends.cpu, "get_cpu_capability", lambda: "another"),
        (metadata, "distributions", lambda: ()),
        (PIL.features, "version", lambda name: "another"),
        (machine, "cpu_lines", lambda: ["model name\t: another"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_machine_changes_the_key(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: Any) -> None:
    before = computed()
    monkeypatch.setattr(owner, name, value)
    assert computed() != before


def test_variables_that_select_kernels_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = computed()
    monkeypatch.setenv("MKL_CBWR", "AVX2,STRICT")
    with_variable = computed()
    monkeypatch.setenv("SOME_OTHER_VARIABLE", "x")
    assert before != with_variable == computed()
    assert "MKL_CBWR" in os.environ


def test_cpu_is_known() -> None:
    assert machine.cpu_lines()
