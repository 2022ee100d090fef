"""The pictures that come with scikit-learn: what the built-in twins are made of, with nothing to download."""

import contextlib
from collections.abc import Iterator

import numpy as np

from niso.errors import UserError


def photographs() -> list[np.ndarray]:
    """A temple and a flower, each 427 x 640 x 3 uint8 (CC BY); UserError if scikit-learn is not installed."""
    with _wanted("photographs", "a folder of images: python -m data_prep.images --root IMAGES --out RECORDS"):
        from sklearn.datasets import load_sample_images
    return load_sample_images().images


def digits() -> tuple[np.ndarray, np.ndarray]:
    """(image_NxHxW of 1,797 handwritten digits, 8 x 8 with values 0 .. 16, label_N), in the order they were collected in.

    The test part of Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits" (CC BY).

    Raises:
        UserError: scikit-learn is not installed.
    """
    with _wanted("digits", "MNIST: python -m data_prep.mnist --root MNIST --out RECORDS"):
        from sklearn.datasets import load_digits
    found = load_digits()
    return found.images, found.target


@contextlib.contextmanager
def _wanted(samples: str, others: str) -> Iterator[None]:
    """Around an import of scikit-learn: without it, says what needs it, and which records can be prepared instead."""
    try:
        yield
    except ImportError:
        need = f"the built-in {samples} need scikit-learn: pip install -e '.[samples]'"
        raise UserError(f"{need}, or prepare {others}") from None
