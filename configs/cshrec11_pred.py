"""Shapes under unknown conformal maps, recognised by a head on the latents of cshrec11_encode, which are trained on with it.

Claim (Neural Isometries, table 2): after fine-tuning together with a head that isometries of the latents cannot change, they
classify SHREC'11's shapes under random Möbius maps, from ten shapes of each class.
Expected, accuracy: NIso 90.26 ± 1.27 %, and of an ordinary head on a plain autoencoder's latents, fine-tuned in the same way,
69.36 ± 2.81 %. Both train on random Möbius maps of the shapes, and are tested on others of the test shapes.
Cost: the paper reports 1 hour on one A6000 for 10,000 steps of 16 shapes.

It goes on from the run of the same variant of cshrec11_encode, in the folder that has it by default:

  python -m niso.main --config=configs/cshrec11_encode.py --config.seeds=5
  python -m niso.main --config=configs/cshrec11_pred.py --config.seeds=5
  python -m niso.report runs/cshrec11_*

`small` and `quick`: synthetic bodies of 8 classes, on a CPU, no data needed:

  python -m niso.main --config=configs/cshrec11_encode.py:quick && python -m niso.main --config=configs/cshrec11_pred.py:quick

Another run: --config.task.warm_start="(('(encoder|operator)/.*', 'runs/other'),)". The head alone:
--config.task.trainable="head/.*".
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import cshrec11_encode
from configs.pose_pred import NETWORK
from niso.errors import UserError

VARIANTS = cshrec11_encode.VARIANTS


def get_config(variant: str = "paper") -> ConfigDict:
    """`paper`: the published sizes. `small`: the small twin, minutes on a CPU. `quick`: the tiny one."""
    if variant not in VARIANTS:
        raise UserError(f"cshrec11_pred has no variant {variant!r}: it has those of cshrec11_encode, {', '.join(VARIANTS)}")
    size, arm = cshrec11_encode.parts(variant)
    config = cshrec11_encode.get_config(variant)
    plain = arm == "autoencoder"
    part = "encoder" if plain else "(encoder|operator)"
    encode = config.task
    config.experiment = "cshrec11_pred"
    config.steps = 10_000
    config.log.figure_examples = 32
    config.task = {
        "name": "classify",
        "trainable": ".*",
        "warm_start": ((f"{part}/.*", f"runs/cshrec11_encode-{variant}"),),
        "size": encode["size"],
        **{key: encode[key] for key in NETWORK},
        "classes": 25,
        "head": "mlp" if plain else "equivariant",
        "layers": 4,
        "head_width": 128,
        "gram": 64,
        "augment": True,
        "warped": True,
        "test_seed": 0,
    }
    if size != "paper":
        _reduce(config, size)
    return config


def _reduce(config: ConfigDict, size: str) -> None:
    """The same experiment with a number of steps, and of classes, that a CPU can do."""
    quick = size == "quick"
    config.steps = 200 if quick else 800
    config.task.update(classes=8, gram=32)
    config.log.update(every=50 if quick else 100, evaluate_every=100 if quick else 200, figures_every=0)
    config.checkpoint.every = config.log.evaluate_every


def sweep() -> Iterator[dict[str, Any]]:
    """Heads on the runs that cshrec11_encode's sweep makes."""
    yield from cshrec11_encode.sweep()
