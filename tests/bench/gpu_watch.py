"""How busy an NVIDIA GPU is, as its driver says."""

import shutil
import subprocess
import threading
from types import TracebackType
from typing import Self

import torch

# The driver's figure is of the last sixth of a second to second.
POLL_S = 0.25


class Watch:
    """Samples the share of time in which a kernel runs, while the block runs; nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._samples: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._command: list[str] = []
        if device.type == "cuda" and shutil.which("nvidia-smi"):
            # CUDA counts the GPUs that it may see, the driver all of them.
            uuid = torch.cuda.get_device_properties(device).uuid
            self._command = ["nvidia-smi", "--query-gpu=utilization.gpu", f"--id=GPU-{uuid}"]
            self._command += ["--format=csv,noheader,nounits"]

    def __enter__(self) -> Self:
        if self._command:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._command:
            self._thread.join()

    @property
    def busy(self) -> float | None:
        """The mean share, 0..1; None where nothing was sampled."""
        return sum(self._samples) / len(self._samples) / 100 if self._samples else None

    def _sample(self) -> None:
        # What it says first is of the time before.
        while not self._over.wait(POLL_S):
            said = subprocess.run(self._command, capture_output=True, text=True, check=False).stdout
            # Slices of a GPU have no such figure: "[N/A]".
            if said.strip().isdecimal():
                self._samples.append(float(said))
