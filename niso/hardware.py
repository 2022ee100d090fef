"""Published figures of accelerators, by the name that jax gives a device.

TPUs: Google's Cloud TPU documentation, pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" (peak compute, HBM, inter-chip
interconnect, chips in a pod). `link` is half of the bidirectional bandwidth that they print for a chip (which is their all-reduce
bandwidth of a pod divided by its chips; for v4, where they print only that, it is that), `network` a pod's data center network
divided by its chips. GPUs: NVIDIA's "A100 Tensor Core GPU", "H100 Tensor Core GPU" and "H200 Tensor Core GPU" data sheets, half of
what they print for sparse matrices, and half of NVLink's total of both directions; `network`: the adapters of the "DGX A100",
"DGX H100" and "DGX H200" data sheets, one to a GPU.

The TPUs were compared with these pages on 2026-11-21 and 2026-11-22; the GPUs' compute, memory and NVLink on 2026-11-22 with what
others quote of the data sheets; their adapters with nothing: check these before a figure rests on them.
"""

import dataclasses

PASSES = 6  # bfloat16 products that a TPU makes of one in full float32 (precision="highest")


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Fields:
      name: short. bfloat16: FLOP/s of matrix products, dense. float32: of those of float32 networks at jax's default precision,
        which are bfloat16 on TPUs and TensorFloat32 on GPUs. full: of float32 products in full precision.
      memory: HBM, bytes. bandwidth: its bytes/s.
      link: bytes/s that it sends over all its links to the `domain` chips that they join. network: bytes/s to those beyond.
    """

    name: str
    bfloat16: float
    float32: float
    full: float
    memory: float
    bandwidth: float
    link: float
    domain: int
    network: float

    def peak(self, dtype: str) -> float:
        """FLOP/s of the products of a network in that type, "bfloat16" or "float32"."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32


def _tpu(name: str, tera: float, memory: float, bandwidth: float, link: float, domain: int, network: float) -> Chip:
    return Chip(name, tera * 1e12, tera * 1e12, tera * 1e12 / PASSES, memory, bandwidth, link, domain, network)


_V4 = _tpu("v4", 275.0, 32 * 2**30, 1200e9, 1.1e15 / 4096, 4096, 0.0)  # a pod is as large as this table goes
_V5E = _tpu("v5e", 197.0, 16e9, 819e9, 200e9, 256, 6.4e12 / 8 / 256)
_V5P = _tpu("v5p", 459.0, 95e9, 2765e9, 600e9, 8960, 0.0)
_V6E = _tpu("v6e", 918.0, 32e9, 1600e9, 400e9, 256, 25.6e12 / 8 / 256)
_A100 = Chip("A100", 312e12, 156e12, 19.5e12, 80e9, 2039e9, 300e9, 8, 25e9)
_H100 = Chip("H100", 989e12, 494e12, 67e12, 80e9, 3350e9, 450e9, 8, 50e9)

CHIPS = {
    "TPU v4": _V4, "TPU v5 lite": _V5E, "TPU v5e": _V5E, "TPU v5": _V5P, "TPU v5p": _V5P, "TPU v6 lite": _V6E, "TPU v6e": _V6E,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-SXM4-40GB": dataclasses.replace(_A100, memory=40e9, bandwidth=1555e9),
    "NVIDIA A100-PCIE-40GB": dataclasses.replace(_A100, memory=40e9, bandwidth=1555e9, domain=2),
    "NVIDIA A100 80GB PCIe": dataclasses.replace(_A100, bandwidth=1935e9, domain=2),
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H200": dataclasses.replace(_H100, name="H200", memory=141e9, bandwidth=4800e9),
}  # fmt: skip


def find(kind: str) -> Chip | None:
    """The figures of a `jax.Device.device_kind`; None for CPUs and whatever else is not in the table."""
    return CHIPS.get(kind)
