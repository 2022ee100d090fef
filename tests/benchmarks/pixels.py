"""What a plain network on pixels makes of Homography MNIST: trained on unperturbed digits, tested on them and on warped ones.

  python -m tests.benchmarks.pixels --variant quick
  python -m tests.benchmarks.pixels --variant small --seeds 3

The floor that hmnist_pred has to be far above: scikit-learn's MLPClassifier (one hidden layer of 128, its own defaults) on the
40 x 40 images that the encoder would see, on the very test images of the variant.
"""

import argparse
import json
import sys
import warnings

import numpy as np

from configs import hmnist_pred
from niso import rng
from niso.config import Experiment
from niso.data.pipeline import open_dataset
from niso.tasks.classify import Classify

CHUNK = 1_000


def images(task: Classify, dataset, count: int, split: str, warped: bool) -> tuple[np.ndarray, np.ndarray]:
    """(image_NxP, label_N) of the training images or of the test set, warped or as they are."""
    found = []
    if split == "train":
        stream = dataset.train_batches(batch=min(CHUNK, count), seed=0, start=0, steps=-(-count // CHUNK), rows=slice(None))
    else:
        stream = dataset.test_batches(batch=CHUNK, rows=slice(None))
    with stream as batches:
        for batch in batches:
            drawn = (task.draw_held_out if warped else task.draw)(batch, rng.stream(0, "pixels"))
            kept_B = np.asarray(batch["weight_B"]) > 0
            found.append((np.asarray(drawn["observation_BxHxWxC"])[kept_B], np.asarray(drawn["label_B"])[kept_B]))
    image_NxHxWxC, label_N = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return image_NxHxWxC.reshape(len(label_N), -1)[:count], label_N[:count]


def measure(variant: str, train: int, seed: int, **changes: object) -> dict[str, float]:
    """Accuracy in percent on the variant's test images, unperturbed and warped; `changes` are config keys with __ for the dot."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    config = hmnist_pred.get_config(variant)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    experiment = Experiment.from_config(config)
    assert isinstance(experiment.task, Classify)
    dataset = open_dataset(experiment.data)
    train = min(train, dataset.train_size)
    fit = images(experiment.task, dataset, train, "train", warped=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        network = MLPClassifier((128,), max_iter=30, random_state=seed).fit(*fit)
    tests = {
        name: images(experiment.task, dataset, 10**9, "test", warped) for name, warped in (("unperturbed", False), ("warped", True))
    }
    return {name: 100.0 * float(network.score(*test)) for name, test in tests.items()}


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pixels", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--variant", default="quick", help="of hmnist_pred: its data and test images (quick)")
    parser.add_argument("--train", type=int, default=20_000, help="training digits, at most (20000)")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args(argv)
    for seed in range(options.seeds):
        print(json.dumps({"variant": options.variant, "seed": seed} | measure(options.variant, options.train, seed)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
