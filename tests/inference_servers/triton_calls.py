"""Calls of tritonclient. Arguments: address and folder for the results."""

import json
import queue
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


def image(values: np.ndarray, datatype: str) -> list[triton.InferInput]:
    tensor = triton.InferInput("image", [*values.shape], datatype)
    tensor.set_data_from_numpy(values)
    return [tensor]


def main(address: str, out: Path) -> None:
    client = triton.InferenceServerClient(address)
    pixels = image(IMAGE[None], "UINT8")
    parameters = {"method": "rise", "masks": 8, "seed": 3, "targets": "1,2", "metrics": "insertion,average-drop"}
    result = client.infer("tiny", pixels, parameters=parameters, request_id="mine")
    names = ("saliency", "target", "probability", "scores")
    np.savez(out / "all.npz", **{name: result.as_numpy(name) for name in names})
    selected = client.infer("tiny", pixels, outputs=[triton.InferRequestedOutput("target")])
    tensor = np.linspace(-1, 1, 3 * 32 * 32, dtype=np.float32).reshape(1, 3, 32, 32)
    np.save(out / "tensor.npy", client.infer("tiny", image(tensor, "FP32")).as_numpy("saliency"))
    file = np.array([(out / "image.png").read_bytes()], dtype=np.object_)
    np.save(out / "file.npy", client.infer("tiny", image(file, "BYTES")).as_numpy("saliency"))
    try:
        client.infer("tiny", pixels, parameters={"mask": 8})
    except InferenceServerException as error:
        failure = [error.status(), error.message()]
    results: queue.Queue[object] = queue.Queue()
    calls = [
        client.async_infer("tiny", pixels, lambda result, error: results.put((result, error)), parameters={"seed": i})
        for i in range(4)
    ]
    answers = [results.get(timeout=120) for _ in calls]
    report = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": [client.is_model_ready(name) for name in ("tiny", "huge")],
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata("tiny", as_json=True),
        "config": client.get_model_config("tiny", as_json=True),
        "response": result.get_response(as_json=True)["parameters"],
        "id": result.get_response().id,
        "selected": [output.name for output in selected.get_response().outputs],
        "failure": failure,
        "asynchronous": sum(error is None for _, error in answers),
    }
    (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
