"""Load a model once for each line on standard input, and print the seconds: `load_process.py CONFIG DEVICE`.

The code of other commits runs this file, so it uses only what they have, too.
"""

from __future__ import annotations

import sys
import time

import torch

from camserve_server.config import ModelConfig
from camserve_server.models.load import load


def main() -> None:
    """Print "ready" after a first load, which imports libraries, and then the seconds of each load."""
    config, device = ModelConfig.model_validate_json(sys.argv[1]), torch.device(sys.argv[2])
    load(config, device)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        load(config, device)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
