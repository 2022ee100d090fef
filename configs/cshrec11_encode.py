"""Neural Isometries on conformal shapes: an autoencoder whose latents turn unknown conformal maps of a surface into isometries.

Claim (Neural Isometries, tables 2 and 4): maps between the latents of one surface under two Möbius maps of the sphere commute
with a learned operator, so a head that isometries cannot change learns to recognise shapes from few examples. That head is
configs/cshrec11_pred.py. A surface is its heat-kernel signature on the sphere, to which a conformal map takes it; that is unique
up to Möbius maps.
Expected: equivariance error 5.91 % on held-out pairs; accuracies of the heads: see there.
Cost: the paper reports 4 hours on one A6000 for 50,000 steps of 16 pairs.

  python -m data_prep.shapes --root MESHES --out records/shapes
  python -m niso.main --config=configs/cshrec11_encode.py --config.seeds=5

MESHES has a folder of closed meshes for each class; the published data set is read with --layout cshrec11.

A variant is a size, and after a dash one arm of table 2: `pairs` (the default), `autoencoder` (reconstruction alone). Sizes:
`paper`; `small`, the small twin of 8 classes of 14 bodies (made once, about a minute), seven minutes on one core with its head;
`quick`, the tiny twin of 3 bodies each, three minutes on one core with its head, no data needed either:

  python -m niso.main --config=configs/cshrec11_encode.py:small-pairs --config.seeds=3
  python -m niso.main --config=configs/cshrec11_encode.py:quick && python -m niso.main --config=configs/cshrec11_pred.py:quick
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from niso.config import base, size_and_arm

SIZES = ("paper", "small", "quick")
ARMS: dict[str, dict[str, Any]] = {  # what differs from pairs
    "pairs": {},
    "autoencoder": {"regime": "reconstruction", "operator": False},
}
VARIANTS = (*SIZES, *(f"{size}-{arm}" for size in SIZES for arm in ARMS))


def get_config(variant: str = "paper") -> ConfigDict:
    """`paper`: the published sizes. `small`: the small twin, minutes on a CPU. `quick`: the tiny one."""
    size, arm = parts(variant)
    config = base()
    config.experiment, config.variant = "cshrec11_encode", variant
    config.steps, config.batch = 50_000, 16
    config.data = {
        "dataset": "shapes",
        "records": "records/shapes",
        "twin": "",
        "size": 192,
        "test_copies": 30,  # as many as there are random maps of every mesh of the published data set
        "in_memory": True,
        "stored_maps": 0,  # 30: those of the published data set, instead of maps drawn in every step
        "threads": 2,
        "prefetch": 8,
        "workers": 0,
        "unreadable": "fatal",
    }
    config.task = {
        "name": "autoencode",
        "trainable": ".*",
        "warm_start": (),
        "size": (96, 192),
        "channels": 16,
        "widths": (32, 64, 128, 256),
        "blocks": 2,
        "latent_channels": 64,
        "operator": True,
        "rank": 64,
        "eigenvalues": "cumulative",
        "group": "O",
        "ridge": 0.0,
        "damping": 1e-7,
        "regime": "pairs",
        "transformation": "moebius",
        "test_seed": 0,
        "alpha": 0.5,
        "beta": 0.01,
        "equivariance": "absolute",
        "both_directions": False,
        "dropout": 0.0,
        "skips": (),
        "dtype": "float32",
        "remat": False,
    }
    if size != "paper":
        _reduce(config, size)
    config.task.update(ARMS[arm])
    return config


def parts(variant: str) -> tuple[str, str]:
    """(size, arm) of a variant."""
    return size_and_arm(variant, SIZES, tuple(ARMS))


def _reduce(config: ConfigDict, size: str) -> None:
    """The same experiment with a network, a grid and a number of steps that a CPU can do; the latent grid is the published one."""
    quick = size == "quick"
    config.steps, config.batch = (150, 8) if quick else (800, 16)
    config.data.update(records="", twin="tiny" if quick else "small", size=48, test_copies=4)
    config.task.update(size=(24, 48), widths=(16, 32), blocks=1, latent_channels=32, rank=32)
    config.optimizer.update(peak=2e-3, final=2e-4, warmup=30 if quick else 100)
    config.log.update(every=50 if quick else 100, evaluate_every=75 if quick else 200, figures_every=0)
    config.checkpoint.every = config.log.evaluate_every


def sweep() -> Iterator[dict[str, Any]]:
    """The paper's five seeds of table 2's arms, side by side."""
    for arm in ARMS:
        yield {"variant": f"paper-{arm}", "seeds": 5}
