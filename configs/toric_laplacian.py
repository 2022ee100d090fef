"""The Laplacian of the torus, from shifted images alone: a maximally simple Neural Isometry, whose answer is known.

Claim (Neural Isometries, figure 3): with identity encoder and decoder, an operator learned from pairs of images related by
random cyclic shifts has the eigenfunctions of the toric Laplacian, and the maps between the images' coefficients are
block-diagonal in its eigenspaces.
Expected: no number is published; see the README's table for what this config reaches and how it develops.
Cost: the paper reports 6 hours on one A6000 for 100,000 steps.

  python -m niso.main --config=configs/toric_laplacian.py

Images: random crops of the two photographs that come with scikit-learn (pip install -e '.[samples]'). Others, such as ImageNet:

  python -m data_prep.images --root IMAGES --out records/images --size 16
  python -m niso.main --config=configs/toric_laplacian.py --config.data.twin= --config.data.records=records/images

`fast`: the same size and the same loss, in fewer steps at a higher rate. Quick: 8 x 8 images, two minutes on a laptop CPU.

  python -m niso.main --config=configs/toric_laplacian.py:fast --config.seeds=3
  python -m niso.main --config=configs/toric_laplacian.py:quick
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from niso.config import base
from niso.errors import UserError

VARIANTS = ("paper", "fast", "quick")


def get_config(variant: str = "paper") -> ConfigDict:
    """`paper`: the published sizes and steps. `fast`: the sizes. `quick`: neither."""
    if variant not in VARIANTS:
        raise UserError(f"toric_laplacian has no variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    return operator_config("toric_laplacian", "torus", variant)


def operator_config(experiment: str, domain: str, variant: str) -> ConfigDict:
    """The experiment on a domain, "torus" or "sphere"."""
    config = base()
    config.experiment, config.variant = experiment, variant
    config.steps, config.batch = 100_000, 1
    config.data = {
        "dataset": "images",
        "records": "",
        "twin": "full",
        "size": 16,
        "stack": 86,
        "test_examples": 64,
        "test_copies": 1,
        "test_records": "",
        "in_memory": True,
        "threads": 2,
        "prefetch": 8,
        "workers": 0,
        "unreadable": "fatal",
    }
    config.task = {
        "name": "laplacian",
        "trainable": ".*",
        "warm_start": (),
        "domain": domain,
        "size": config.data.get_ref("size"),
        "channels": 3 * config.data.get_ref("stack"),
        "rank": 256 if domain == "torus" else 64,
        "eigenvalues": "cumulative",
        "group": "O",
        "ridge": 0.0,
        "damping": 1e-7,
        "beta": 0.1,
        "beta_final": 0.1,
        "dropout": 0.5,
        "dropout_law": "uniform",
    }
    config.log.update(every=500, evaluate_every=5_000, figures_every=20_000, figure_examples=4)
    if variant != "paper":
        _reduce(config, domain, variant)
    return config


def _reduce(config: ConfigDict, domain: str, variant: str) -> None:
    """`fast`: higher rates over fewer steps, and a β that falls from a large value (README, results).

    `quick`: a grid of 8 x 8, all of whose functions are learned.
    """
    torus = domain == "torus"
    config.optimizer.update(peak=1e-2, final=1e-4, warmup=200)
    if variant == "fast":
        config.steps = 24_000 if torus else 10_000
        config.task.update(beta=1.0 if torus else 0.05, beta_final=0.05 if torus else 0.01, dropout_law="log")
        config.log.update(every=500, evaluate_every=2_000, figures_every=8_000)
        config.checkpoint.every = 2_000
        return
    config.steps = 8_000
    config.task.update(beta=0.5 if torus else 0.03, beta_final=0.025 if torus else 0.03)
    config.data.update(twin="tiny", size=8, test_examples=16)
    config.task.rank = 64 if domain == "torus" else 16
    config.log.update(every=500, evaluate_every=2_000, figures_every=4_000)
    config.checkpoint.every = 2_000


def sweep() -> Iterator[dict[str, Any]]:
    """Overrides of the paper's five seeds, and of what the results' development was measured with."""
    yield {"seeds": 5}
    for key, values in {"task.beta": (0.02, 0.5), "task.dropout": (0.0, 1.0), "batch": (4, 16), "optimizer.peak": (2e-3,)}.items():
        for value in values:
            yield {"seeds": 3, key: value}
