"""Where an engine will run: device and instruction set. Backends choose providers and schemes by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fxopt.errors import InputError

__all__ = ["Target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where an engine will run.

    Attributes:
        device: "cpu" or "cuda", with an optional index as in "cuda:1".
        instruction_set: what the device's fastest kernels use, such as "AVX2", "AVX512 VNNI" or "SM 9.0"; "" if not
            known.
    """

    device: str = "cpu"
    instruction_set: str = ""

    def __post_init__(self) -> None:
        kind = self.device.partition(":")[0]
        if kind not in ("cpu", "cuda"):
            raise InputError(f'target device must be "cpu" or "cuda", not {self.device!r}')

    @classmethod
    def detect(cls, device: str = "cpu") -> Target:
        """This machine's own target.

        Raises:
            InputError: if the device is not here.
        """
        if device.partition(":")[0] == "cuda":
            if not torch.cuda.is_available():
                raise InputError(f"target {device!r}: this machine has no CUDA device")
            major, minor = torch.cuda.get_device_capability(device)
            return cls(device=device, instruction_set=f"SM {major}.{minor}")
        widest = torch.backends.cpu.get_cpu_capability()
        return cls(device=device, instruction_set=f"{widest} VNNI" if torch.cpu._is_vnni_supported() else widest)

    @property
    def adds_products_in_32_bits(self) -> bool:
        """Whether a CPU adds up products of 8-bit integers without an intermediate result of 16 bits.

        x86 does with VNNI only; of other CPUs, which have no AVX, it is taken for granted.
        """
        return "VNNI" in self.instruction_set or "AVX" not in self.instruction_set

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `Target(**data)` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Target:
        """Reads what `to_json` wrote."""
        return cls(**data)
