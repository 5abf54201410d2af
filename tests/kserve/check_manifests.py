"""Compare manifests with the models of KServe's SDK, which KServe generates from its API. Arguments: YAML files.

It runs in a process of its own, like everything that imports the SDK. It prints one line for each problem.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from kserve import models as kserve_models
from kubernetes.client import models as kubernetes_models

KINDS = {"InferenceService": "V1beta1InferenceService", "ServingRuntime": "V1alpha1ServingRuntime"}
SCALARS: dict[str, Any] = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object}


def problems(value: Any, kind: str, path: str) -> Iterator[str]:
    """Yield the problems of a value that should have an OpenAPI type of the SDK."""
    if match := re.fullmatch(r"list\[(.+)\]", kind, re.IGNORECASE):
        if not isinstance(value, list):
            yield f"{path}: expected a list"
            return
        for i, each in enumerate(value):
            yield from problems(each, match[1], f"{path}[{i}]")
    elif match := re.fullmatch(r"dict[\[(]str, (.+)[\])]", kind, re.IGNORECASE):
        if not isinstance(value, dict):
            yield f"{path}: expected a mapping"
            return
        for key, each in value.items():
            yield from problems(each, match[1], f"{path}.{key}")
    elif kind in SCALARS:
        if not isinstance(value, SCALARS[kind]):
            yield f"{path}: expected {kind}"
    elif (model := find(kind)) is None:
        return  # a quantity, or a number or string
    elif isinstance(value, dict):
        yield from fields(value, model, path)
    else:
        yield f"{path}: expected an object"


def find(kind: str) -> Any:
    found = getattr(kserve_models, kind, None) or getattr(kubernetes_models, kind, None)
    return found if hasattr(found, "attribute_map") else None


def fields(value: dict[str, Any], model: Any, path: str) -> Iterator[str]:
    types = {key: model.openapi_types[name] for name, key in model.attribute_map.items()}
    for key, each in value.items():
        if key in types:
            yield from problems(each, types[key], f"{path}.{key}")
        else:
            yield f"{path}.{key}: unknown"
    names = {key: name for name, key in model.attribute_map.items()}
    try:
        model(**{names[key]: each for key, each in value.items() if key in names})
    except ValueError as error:  # a required field is missing
        yield f"{path}: {error}"


def main() -> None:
    for file in sys.argv[1:]:
        for manifest in yaml.safe_load_all(Path(file).read_text(encoding="utf-8")):
            for problem in problems(manifest, KINDS[manifest["kind"]], manifest["kind"]):
                print(problem)


if __name__ == "__main__":
    main()
