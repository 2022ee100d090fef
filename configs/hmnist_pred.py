"""Digits under unknown homographies, recognised by a head that has never seen one: on the latents of hmnist_encode, frozen.

Claim (Neural Isometries, table 1): a head that isometries of the latents cannot change, trained on unperturbed digits, classifies
homNIST (32 random homographies of every test digit).
Expected, accuracy: triplets 97.38 ± 0.23, pairs 92.52 ± 0.91, without L_E 77.30 ± 2.56, without L_M 45.27 ± 1.20, and of an
ordinary head on a plain autoencoder's latents, with random homographies as augmentation, 80.96 ± 1.95 %.
Cost: the paper reports 1 minute on one A6000 for 10,000 steps of 16 digits.

It goes on from the run of the same variant of hmnist_encode, in the folder that has it by default:

  python -m niso.main --config=configs/hmnist_encode.py --config.seeds=5
  python -m niso.main --config=configs/hmnist_pred.py --config.seeds=5
  python -m niso.main --config=configs/hmnist_encode.py:paper-pairs --config.seeds=5
  python -m niso.main --config=configs/hmnist_pred.py:paper-pairs --config.seeds=5
  python -m niso.report runs/hmnist_*

`small`: minutes on a CPU, 2,000 of the 320,000 test images. Quick: scikit-learn's own digits, no data needed:

  python -m niso.main --config=configs/hmnist_encode.py:quick && python -m niso.main --config=configs/hmnist_pred.py:quick

Another run: --config.task.warm_start="(('(encoder|operator)/.*', 'runs/other'),)". Encoder and head together:
--config.task.trainable=".*". The published test set, read by `python -m data_prep.homnist --mat FILE --out records/homnist`:
--config.data.test_records=records/homnist --config.data.test_copies=1.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import hmnist_encode
from configs.pose_pred import NETWORK
from niso.errors import UserError

VARIANTS = hmnist_encode.VARIANTS


def get_config(variant: str = "paper") -> ConfigDict:
    """`paper`: the published sizes. `small`: MNIST, minutes on a CPU. `quick`: the digits of scikit-learn."""
    if variant not in VARIANTS:
        raise UserError(f"hmnist_pred has no variant {variant!r}: it has those of hmnist_encode, {', '.join(VARIANTS)}")
    size, arm = hmnist_encode.parts(variant)
    config = hmnist_encode.get_config(variant)
    plain = arm == "autoencoder"
    part = "encoder" if plain else "(encoder|operator)"
    encode = config.task
    config.experiment = "hmnist_pred"
    config.steps = 10_000
    config.data.update(test_examples=320_000, test_copies=32)
    config.log.figure_examples = 32
    config.task = {
        "name": "classify",
        "trainable": "head/.*",
        "warm_start": ((f"{part}/.*", f"runs/hmnist_encode-{variant}"),),
        "size": 40,
        **{key: encode[key] for key in NETWORK},
        "classes": 10,
        "head": "mlp" if plain else "equivariant",
        "layers": 2,
        "head_width": 128,
        "gram": 64,
        "augment": plain,
        "warped": True,
        "test_seed": 0,
    }
    if size != "paper":
        _reduce(config, size)
    return config


def _reduce(config: ConfigDict, size: str) -> None:
    """The same experiment with a number of steps, and of test images, that a CPU can do."""
    quick = size == "quick"
    config.steps, config.batch = (1_500 if quick else 3_000), 16
    config.task.gram = 32
    config.data.update(test_examples=1_440 if quick else 2_000, test_copies=4 if quick else 1)
    config.log.update(every=100 if quick else 500, evaluate_every=500 if quick else 1_000, figures_every=0)
    config.checkpoint.every = 500 if quick else 1_000


def sweep() -> Iterator[dict[str, Any]]:
    """Heads on the runs that hmnist_encode's sweep makes."""
    yield from hmnist_encode.sweep()
