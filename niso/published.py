"""The tables of the paper (Mitchel, Taylor, Sitzmann: Neural Isometries, NeurIPS 2024), and where niso writes the same numbers.

A figure is text, as it is printed there: mean ± standard error of five runs. homConv, LieDecomp, DINOv2, BEiT and Möbius
convolutions are other people's systems, some of which niso does not have.
"""

import dataclasses
from collections.abc import Mapping

TABLES = (1, 2, 3, 4)
SKIPS = (0, 1, 3, 5, 7, 9)  # frames between two views; the stride is one more


@dataclasses.dataclass(frozen=True)
class Part:
    """A table, or the part of one that one kind of run fills.

    Fields:
      table: its number in the paper. dataset, quantity: what it is about. experiment: config.experiment of the runs that fill it.
      columns: what each of its figures is called. metrics: the name in metrics.jsonl of each. digits: after the point, of ours.
      rows: label -> the published figure of every column.
      names: how `niso.report` describes a run -> the label of the row that it fills, where these differ.
    """

    table: int
    dataset: str
    quantity: str
    experiment: str
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    digits: int
    rows: Mapping[str, tuple[str, ...]]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _row(figures: str) -> tuple[str, ...]:
    return tuple(figures.split())


HMNIST, CSHREC, CO3D = "Homography MNIST", "Conformal SHREC'11", "CO3Dv2"
ACCURACY, ERROR = "accuracy, %", "equivariance error, %"
PAIRS = {"NIso (pairs)": "NIso"}  # the paper has no triplets there
BY_SKIP = tuple(f"skip {skip}" for skip in SKIPS)

PARTS = (
    Part(
        1, HMNIST, ACCURACY, "hmnist_pred", ("accuracy",), ("eval/accuracy",), 2,
        {
            "NIso (pairs)": ("92.52 ± 0.91",),
            "NIso (triplets)": ("97.38 ± 0.23",),
            "without L_E": ("77.30 ± 2.56",),
            "without L_M": ("45.27 ± 1.20",),
            "NFT": ("41.93 ± 0.84",),
            "NFT (triplets)": ("67.15 ± 1.10",),
            "autoencoder + augmentation": ("80.96 ± 1.95",),
            "homConv": ("95.71 ± 0.09",),
            "LieDecomp": ("98.30 ± 0.10",),
        },
        {"NIso (pairs), without L_E": "without L_E", "NIso (pairs), without L_M": "without L_M"},
    ),
    Part(
        2, CSHREC, ACCURACY, "cshrec11_pred", ("accuracy",), ("eval/accuracy",), 2,
        {
            "NIso": ("90.26 ± 1.27",),
            "NFT": ("83.24 ± 2.03",),
            "autoencoder + augmentation": ("69.36 ± 2.81",),
            "Möbius convolutions": ("86.5",),
        },
        {"NIso (pairs), with augmentation": "NIso"},
    ),
    Part(
        3, CO3D, "ATE by frame skip", "pose_pred", BY_SKIP, tuple(f"trajectories/stride_{skip + 1}/ate_ref" for skip in SKIPS), 4,
        {
            "NIso": _row(".023 .031 .044 .057 .071 .081"),
            "without Ω": _row(".027 .045 .068 .084 .098 .110"),
            "NFT": _row(".022 .035 .059 .077 .091 .104"),
            "DINOv2": _row(".027 .045 .068 .084 .097 .110"),
            "BEiT": _row(".028 .046 .068 .085 .098 .110"),
            "ViT": _row(".020 .042 .066 .083 .097 .109"),
        },
        PAIRS | {"NIso (pairs), without Ω": "without Ω"},
    ),
    Part(  # the paper does not say which regime
        4, HMNIST, ERROR, "hmnist_encode", ("error",), ("eval/equivariance_error",), 2,
        {"NIso (pairs)": ("4.06",), "homConv": ("6.86",)},
    ),
    Part(
        4, CSHREC, ERROR, "cshrec11_encode", ("error",), ("eval/equivariance_error",), 2,
        {"NIso": ("5.91",), "Möbius convolutions": ("2.64",)}, PAIRS,
    ),
    Part(
        4, CO3D, f"{ERROR}, by frame skip", "pose_encode", BY_SKIP,
        tuple(f"eval/equivariance_error_skip_{skip}" for skip in SKIPS), 2,
        {"NIso": _row("5.25 5.84 7.44 8.23 8.79 9.24")},
        PAIRS | {"NIso (pairs), without Ω": "without Ω"},
    ),
)  # fmt: skip
