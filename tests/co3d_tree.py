"""A small hand-made CO3Dv2 tree for the tests of data_prep.co3d."""

import gzip
import json

import numpy as np
from PIL import Image

SIZE = 16
EVERYTHING = {"top_quantile": 0.0, "test_fraction": 0.34, "size": SIZE, "shards": 3, "progress": False}


def make_frame(root, category, name, number, rng, *, height=41, width=30, suffix=None):
    """One frame annotation with its image: random noise, a random rotation, both intrinsics formats."""
    path = f"{category}/{name}/images/frame{number + 1 if suffix is None else suffix:06d}.jpg"
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(root / path, quality=90)
    r_3x3, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    viewpoint = {
        "R": (r_3x3 * np.sign(np.linalg.det(r_3x3))).tolist(),
        "T": rng.normal(size=3).tolist(),
        "focal_length": rng.uniform(1, 3, 2).tolist(),
        "principal_point": rng.uniform(-0.1, 0.1, 2).tolist(),
    }
    if number % 3:
        viewpoint["intrinsics_format"] = "ndc_isotropic" if number % 3 == 1 else "ndc_norm_image_bounds"
    return {
        "sequence_name": name,
        "frame_number": number,
        "frame_timestamp": 0.1 * number,
        "image": {"path": path, "size": [height, width]},
        "depth": None,
        "mask": None,
        "viewpoint": viewpoint,
        "meta": None,
        "a_key_of_the_future": 1,
    }


def write_annotations(root, category, frames, scores):
    sequences = [
        {"sequence_name": name, "category": category, "video": None, "point_cloud": None, "viewpoint_quality_score": score}
        for name, score in scores.items()
    ]
    for kind, value in (("frame", frames), ("sequence", sequences)):
        (root / category).mkdir(parents=True, exist_ok=True)
        with gzip.open(root / category / f"{kind}_annotations.jgz", "wt") as file:
            json.dump(value, file)


def read_annotations(root, category):
    with gzip.open(root / category / "frame_annotations.jgz") as file:
        return {(a["sequence_name"], a["frame_number"]): a for a in json.load(file)}


def make_tree(root):
    """Two categories of six sequences of five frames, in no order; returns root."""
    rng = np.random.default_rng(0)
    for category in ("apple", "bench"):
        names = [f"{n}_{100 + n}_{200 + n}" for n in range(6)]
        frames = [make_frame(root, category, name, number, rng) for name in names for number in range(5)]
        rng.shuffle(frames)
        write_annotations(root, category, frames, dict(zip(names, rng.uniform(0, 2, 6).tolist(), strict=True)))
    return root
