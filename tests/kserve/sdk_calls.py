"""Calls of the gRPC client of KServe's SDK. Arguments: address, model, folder of the files, and trace context."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import PIL.Image
from kserve import InferenceGRPCClient, InferInput, InferRequest, InferResponse


def image(values: Any, datatype: str) -> InferInput:
    tensor = InferInput("image", [*values.shape], datatype)
    tensor.set_data_from_numpy(values)
    return tensor


async def main(address: str, model: str, out: Path) -> None:
    client = InferenceGRPCClient(address)

    async def infer(tensor: InferInput, timeout: float = 120, **parameters: Any) -> InferResponse:
        request = InferRequest(model, [tensor], request_id="mine", parameters=parameters)
        return await client.infer(request, timeout=timeout, headers=[("traceparent", sys.argv[4])])

    pixels = image(np.asarray(PIL.Image.open(out / "image.png"))[None], "UINT8")
    response = await infer(pixels, method="rise", masks=8, seed=3, targets="1,2", metrics="insertion,average-drop")
    file = np.array([(out / "image.png").read_bytes()], dtype=np.object_)
    from_file = await infer(image(file, "BYTES"), method="grad-cam")
    np.savez(
        out / "all.npz",
        **{each.name: each.as_numpy() for each in response.outputs},
        from_file=from_file.outputs[0].as_numpy(),
    )
    failures = {}
    wrong: dict[str, dict[str, Any]] = {
        "method": {"method": "no-cam"},
        "parameter": {"mask": 1},
        "type": {"seed": "one"},
        "late": {"method": "rise", "masks": 1_000_000, "timeout": 1.0},
    }
    for name, parameters in wrong.items():
        try:
            await infer(pixels, **parameters)
        except grpc.RpcError as error:
            failures[name] = (error.code().name, error.details())
    try:
        await client.infer(InferRequest("Wintersohn\nforged", [pixels]))
    except grpc.RpcError as error:
        failures["model"] = (error.code().name, error.details())
    report = {
        "live": await client.is_server_live(),
        "ready": await client.is_server_ready(),
        "model_ready": await client.is_model_ready(model),
        "id": response.id,
        "parameters": {name: value.string_param for name, value in response.parameters.items()},
        "failures": failures,
    }
    (out / "report.json").write_text(json.dumps(report))
    await client.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
