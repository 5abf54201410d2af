"""Write the corpus of fuzz_with_atheris.py: `python -m tests.fuzz.corpus`. Each file is one input."""

from __future__ import annotations

from pathlib import Path

from camserve.v1 import explain_pb2 as pb
from camserve_server import registry
from tests.fuzz.sample_images import VALID

CORPUS = Path(__file__).parent / "corpus"


def seeds() -> dict[str, bytes]:
    """Return images of each format, and requests that together set each field."""
    registry.discover()
    found = {f"image-{name}": b"i" + data for name, data in VALID.items()}
    tensor = pb.Tensor(shape=[2, 2], data=bytes(16))
    for i, name in enumerate(("opti-cam", "poly-cam", "rise", "grad-cam")):
        spec = pb.MethodSpec(name=name, layers=["r1", "r3"][i % 2 :], seed=i)
        spec.parameters.update({p.name: p.default for p in registry.METHODS[name].parameters})
        metric = pb.MetricSpec(name="insertion" if i % 2 else "pixel-f1")
        metric.parameters.update({"steps": 8.0} if i % 2 else {})
        truth = pb.Truth(boxes=[pb.Box(left=0.1, top=0.2, right=0.9, bottom=0.8)], mask=tensor if i > 1 else None)
        found[f"explain-{name}"] = b"x" + pb.ExplainRequest(
            request_id="r",
            model="model",
            image=pb.Image(pixels=pb.Pixels(height=1, width=2, data=b"abcdef")),
            method=spec,
            targets=[pb.Target(index=i)] if i else [],
            target_top_k=0 if i else 2,
            metrics=[metric],
            top_k=3,
            raw=True,
            budget=5000,
            batch_sizes={"forward": 4},
            truth=truth,
            precision="fp32",
            map_format=pb.MapFormat(dtype="uint8", native=bool(i)),
        ).SerializeToString(deterministic=True)
        found[f"evaluate-{name}"] = b"v" + pb.EvaluateRequest(
            image=pb.Image(encoded=VALID["png-16-bit"]),
            **({"method": spec} if i % 2 else {"saliency": tensor}),
            target=pb.Target(label="cat") if i > 1 else pb.Target(index=i),
            metrics=[metric],
            seed=7,
            truth=truth,
            map_format=pb.MapFormat(dtype="float16"),
        ).SerializeToString(deterministic=True)
    return found


if __name__ == "__main__":
    CORPUS.mkdir(exist_ok=True)
    for name, data in seeds().items():
        (CORPUS / name).write_bytes(data)
