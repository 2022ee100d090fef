"""Relative camera poses from the maps of pose_encode: its encoder and operator, frozen, and a small head on τ.

Claim (Neural Isometries): an MLP on the isometry between two frames' latents gives their relative pose well enough to chain
whole trajectories, at large frame skips better than one on features of DINOv2 or BEiT, or than a ViT trained from scratch.
Expected: ATE of held-out trajectories .023 / .031 / .044 / .057 / .071 / .081 at frame skips 0 / 1 / 3 / 5 / 7 / 9;
without Ω .027 / .045 / .068 / .084 / .098 / .110.
Cost: the paper reports 80 minutes on one A6000 for 20,000 steps of 4 sequences x 4 pairs.

It goes on from the run of the same variant of pose_encode, in the folder that has it by default:

  python -m niso.main --config=configs/pose_encode.py
  python -m niso.main --config=configs/pose_pred.py

Quick: both on the built-in tiny twin, minutes on a laptop CPU. `small`: both on the small twin.

  python -m niso.main --config=configs/pose_encode.py:quick && python -m niso.main --config=configs/pose_pred.py:quick

Another run: --config.task.warm_start="(('(encoder|operator)/.*', 'runs/other'),)". Without Ω: name the pose_encode run that
had none and set --config.task.operator=False. The published scale, blind to the sign: --config.task.scale=published.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import pose_encode
from niso.errors import UserError

VARIANTS = pose_encode.VARIANTS
# Keys of the network and of the solve: what the frozen parameters were trained as.
NETWORK = (
    "channels", "widths", "blocks", "latent_channels", "operator", "rank", "eigenvalues", "group", "ridge", "damping", "dtype",
    "remat",
)  # fmt: skip


def get_config(variant: str = "paper") -> ConfigDict:
    """`paper`: the published sizes. `small`: the small synthetic twin, minutes on a CPU. `quick`: the tiny one."""
    if variant not in VARIANTS:
        raise UserError(f"pose_pred has no variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    config = pose_encode.get_config(variant)
    encode = config.task
    config.experiment = "pose_pred"
    config.steps, config.batch = 20_000, 4
    config.data.update(views=5, poses=True, test_every=397)  # prime, of a million windows
    config.task = {
        "name": "pose",
        "trainable": "head/.*",
        "warm_start": _warm_start(f"pose_encode-{variant}"),
        "size": config.data.get_ref("size"),
        **{key: encode[key] for key in NETWORK},
        "layers": 5,
        "head_width": 512,
        "scale": "positive",
        "strides": (1, 2, 4, 6, 8, 10),
        "limit": 200,  # frames of a video; the twins' have 16 and 60
    }
    if variant != "paper":
        _reduce(config, variant)
    return config


def _reduce(config: ConfigDict, variant: str) -> None:
    """The same experiment on a synthetic twin. The tiny twin's 16 frames hold windows of frame skips 0, 1 and 2 only."""
    quick = variant == "quick"
    config.steps = 300 if quick else 3_000
    config.data.test_every = 1 if quick else 5
    config.task.update(head_width=256, limit=16 if quick else 60, strides=(1, 2, 4) if quick else config.task.strides)
    config.log.update(every=50 if quick else 100, evaluate_every=150 if quick else 1_000, figures_every=0)
    config.checkpoint.every = 150 if quick else 1_000


def _warm_start(run: str) -> tuple[tuple[str, str], ...]:
    return (("(encoder|operator)/.*", f"runs/{run}"),)


def sweep() -> Iterator[dict[str, Any]]:
    """Overrides of the paper's five seeds, with and without Ω.

    Each goes on from the pose_encode run of its own seed: --workdir=runs/pose_encode-paper-SEED, and
    runs/pose_encode-paper-SEED-without-operator.
    """
    for seed in range(5):
        run = f"pose_encode-paper-{seed}"
        yield {"seed": seed, "task.warm_start": _warm_start(run)}
        yield {"seed": seed, "task.operator": False, "task.warm_start": _warm_start(f"{run}-without-operator")}
