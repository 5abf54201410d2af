"""Two GPUs that are simulated on the CPU, as a plugin of pytest, for machines without a GPU.

`pytest -p tests.simulated_gpu -m gpu` runs the tests with the mark `gpu`. The simulation shows:

- operations on tensors of several devices, which raise the error that CUDA raises;
- steps that cannot be recorded as a CUDA graph, because they read values on the host or wait for the GPU;
- recordings that depend on more than the memory of their tensors: a replay repeats the operations of torch, without the
  Python code, on the memory of the recording.

It shows neither speed, nor memory, nor the rounding and the asynchrony of a GPU.

torch must not be imported before this package. It compiles `device.cpp` with the compiler of the machine.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

GPUS = 2


def _load_device() -> ctypes.CDLL:
    """Compile the device and load it into the process, which makes torch use it once torch is imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "device.so"
        command = ["c++", "-std=c++20", "-shared", "-fPIC", f"-DGPUS={GPUS}", f"-I{torch / 'include'}"]
        command += [str(Path(__file__).with_name("device.cpp")), "-o", str(library)]
        command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


assert "torch" not in sys.modules, "torch is imported already; load this plugin with the option -p of pytest"
DEVICE = _load_device()

from tests.simulated_gpu import cuda  # noqa: E402

cuda.install()
