"""What the planner knows of devices: a small table of published figures, and where each comes from."""

from __future__ import annotations

import os
from typing import NamedTuple

from llm_core.errors import UserError

GIB = 2**30


class Device(NamedTuple):
    """One device, and how it is joined to the others.

    narrow, wide: peak FLOP/s of products of 16-bit numbers (sums in 32 bits), and of 32-bit ones. memory: bytes;
    bandwidth: of it, bytes/s. link, network: bytes/s that a device sends to those of its machine, and to those of
    others; latency: seconds of a collective without content. per_machine: devices of a machine. efficiency: the share
    of the peak at which a training step multiplies. communicator: bytes of a group's buffers. source: of the figures.
    """

    name: str
    narrow: float
    wide: float
    memory: int
    bandwidth: float
    link: float
    network: float
    latency: float
    per_machine: int
    efficiency: float
    communicator: int
    source: str

    @property
    def is_cpu(self) -> bool:
        """Whether its ranks are processes of one machine that share its memory and cores."""
        return self.name == "cpu"


_ASCEND = "Atlas product pages; groups' buffers: HCCL_BUFFSIZE, 200 MB each way"
_NVIDIA = "NVIDIA's data sheets, without sparsity, one direction of NVLink"

# efficiency: 910B is set so that upstream's figure for Llama2-7B comes out (docs/plan.md), 910A is taken to be the
# same; A100 from PaddleNLP's and InternLM's published 7B steps (52 and 62 % of the peak), H100 and H200 from
# Megatron-LM's published 41 to 48 %; cpu from benchmarks/results/train_step.json.
TABLE = (
    Device("910A", 256e12, 64e12, 32 * GIB, 1.2e12, 90e9, 12.5e9, 3e-5, 8, 0.55, 400 << 20, _ASCEND),
    Device("910B", 313e12, 78e12, 64 * GIB, 1.6e12, 196e9, 25e9, 3e-5, 8, 0.58, 400 << 20, _ASCEND),
    Device("A100", 312e12, 19.5e12, 80 * GIB, 2.0e12, 300e9, 25e9, 2e-5, 8, 0.55, 200 << 20, _NVIDIA),
    Device("H100", 989e12, 67e12, 80 * GIB, 3.35e12, 450e9, 50e9, 2e-5, 8, 0.45, 200 << 20, _NVIDIA),
    Device("H200", 989e12, 67e12, 141 * 10**9, 4.8e12, 450e9, 50e9, 2e-5, 8, 0.45, 200 << 20, _NVIDIA),
)
_OF_TARGET = {"Ascend": "910B", "GPU": "A100", "CPU": "cpu"}


def device_named(name: str) -> Device:
    """The device of that name, in whatever case: "910B", "ascend 910b", "cpu". UserError names those there are."""
    wanted = name.lower().removeprefix("ascend").removeprefix("nvidia").strip(" -_")
    for device in TABLE:
        if device.name.lower() == wanted:
            return device
    if wanted == "cpu":
        return this_cpu()
    known = ", ".join([*(device.name for device in TABLE), "cpu"])
    raise UserError(f"--device {name}: unknown device; give one of {known}")


def device_of_target(target: str) -> Device:
    """What is planned for where nobody names a device: by context.device_target."""
    return device_named(_OF_TARGET[target])


def this_cpu() -> Device:
    """This machine: its memory, and the cores that this process may use.

    A core multiplies 32 numbers at once and adds them, at 2.5 GHz (AVX-512; half as many with AVX2). Between ranks on
    one machine MindSpore's collectives move 150 MB/s, and take 2.6 ms for nothing.
    """
    from llm_core.runtime import usable_cores

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lanes = 64 if _has_avx512() else 32
    peak = usable_cores() * lanes * 2.5e9
    return Device(
        "cpu", peak, peak, memory, 2e10, 1.5e8, 1.5e8, 2.6e-3, 1 << 30, 0.6, 0, "this machine; docs/plan.md"
    )


def _has_avx512() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            return any("avx512f" in line for line in lines if line.startswith("flags"))
    except OSError:
        return False
