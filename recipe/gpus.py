"""What is known of GPUs from NVIDIA's data sheets, and what is assumed where nothing was measured. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

CARDS = {
    "H200 NVL": (835e12, 600), "H200": (989e12, 700),
    "H100 PCIe": (756e12, 350), "H100 NVL": (835e12, 400), "H100": (989e12, 700),
    "A100 80GB PCIe": (312e12, 300), "A100-PCIE": (312e12, 250), "A100-SXM4?": (312e12, 400), "A100": (312e12, None),
    "L40S": (362e12, 350), "L4": (121e12, 72), "RTX 4090": (165e12, 450),
}  # fmt: skip
"""Dense bf16 peak in FLOP/s and power limit in watts of the data sheet, by a pattern of the device's name; the first match
counts."""


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by its name, or None for one that is not in the table."""
    return _card(device_name)[0]


def power_limit(device_name: str) -> int | None:
    """Watts of a GPU by its name, or None where they are not known."""
    return _card(device_name)[1]


def _card(device_name: str) -> tuple[float | None, int | None]:
    return next((card for name, card in CARDS.items() if re.search(rf"\b{name}\b", device_name)), (None, None))


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    name: str
    """As it matches CARDS."""
    memory: int
    """GiB."""
    bus: float
    """What a ring all-reduce moves for each GPU of one node, bytes/s. An assumption: about three quarters of the link's one-way
    rate on NVIDIA's data sheet."""
    network: float
    """The same between nodes of eight, bytes/s, an assumption."""
    mfu: float
    """Causal MFU assumed where nothing was measured."""
    why: str
    """Where that comes from."""
    cores: int = 0
    """Of a CPU."""

    @property
    def peak(self) -> float:
        """FLOP/s in the precision that is trained in: bf16, on a CPU fp32."""
        return CORE_FLOPS * self.cores if self.cores else peak_flops(self.name)


CORE_FLOPS = 100e9
"""fp32 peak of a core with AVX2 and two units, at 3 GHz."""


def cpu(cores: int, memory: int) -> Gpu:
    """A CPU, of `memory` GiB, in the place of a GPU."""
    return Gpu("CPU", memory, 10e9, 1e9, 0.5, "as two cores of a server train the quickstart", cores)


GPUS = {
    "A100-40GB": Gpu("A100", 40, 230e9, 20e9, 0.50, "llm.c reaches 0.56 there; ours is not measured on it"),
    "A100-80GB": Gpu("A100", 80, 230e9, 20e9, 0.50, "llm.c reaches 0.56 there; ours is not measured on it"),
    "H100-80GB": Gpu("H100", 80, 340e9, 40e9, 0.48, "as measured for 774M"),
    "H200-141GB": Gpu("H200", 141, 340e9, 40e9, 0.54, "as measured for 1558M"),
    "RTX4090-24GB": Gpu("RTX 4090", 24, 20e9, 1.2e9, 0.50, "assumed"),
    "L4-24GB": Gpu("L4", 24, 20e9, 1.2e9, 0.45, "assumed"),
    "CPU-8core": cpu(8, 32),
}
"""By the name that `--machine 8xA100-80GB` uses."""
