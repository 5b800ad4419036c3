"""How busy an NVIDIA GPU is, as its driver says."""

import shutil
import subprocess
import threading
from types import TracebackType
from typing import Self

import torch

POLL_MS = 100


class Watch:
    """Samples the share of time in which a kernel runs, while the block runs; nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._samples: list[float] = []
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        if self._device.type == "cuda" and shutil.which("nvidia-smi"):
            # CUDA counts the GPUs that it may see, the driver all of them.
            uuid = torch.cuda.get_device_properties(self._device).uuid
            self._process = subprocess.Popen(
                [
                    "nvidia-smi",
                    "--query-gpu=utilization.gpu",
                    "--format=csv,noheader,nounits",
                    f"--id=GPU-{uuid}",
                    f"--loop-ms={POLL_MS}",
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._thread.join()
            self._process.wait()

    @property
    def busy(self) -> float | None:
        """The mean share, 0..1; None where nothing was sampled."""
        return sum(self._samples) / len(self._samples) / 100 if self._samples else None

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # Slices of a GPU have no such figure: "[N/A]".
            if line.strip().isdecimal():
                self._samples.append(float(line))
