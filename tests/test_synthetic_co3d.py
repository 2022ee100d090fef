"""The synthetic CO3D twin: its layout, its cameras, its motion, its awkward cases, its restarts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import synthetic_co3d, turntable, twin
from data_prep.raycast import Camera, render
from niso.errors import UserError

TINY = twin.plan(twin.SIZES["tiny"], 0)
SMALL = twin.plan(twin.SIZES["small"], 0)
FRAME_KEYS = ["sequence_name", "frame_number", "frame_timestamp", "image", "depth", "mask", "viewpoint", "meta"]
SEQUENCE_KEYS = ["sequence_name", "category", "video", "point_cloud", "viewpoint_quality_score"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("twin")
    synthetic_co3d.generate(out, "tiny", progress=False)
    return out


def picture(sequence: twin.Sequence, t: int) -> np.ndarray:
    return render(twin.scene(sequence), twin.cameras(sequence)[t]).astype(float)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def jgz(path: Path) -> Any:
    return json.loads(gzip.decompress(path.read_bytes()))


# Layout


def test_layout_and_keys_are_those_of_co3d(root: Path) -> None:
    subsets = json.loads((root / "category_to_subset_name_list.json").read_text())
    assert len(subsets) == 2
    for category, (subset,) in subsets.items():
        frames = jgz(root / category / "frame_annotations.jgz")
        sequences = jgz(root / category / "sequence_annotations.jgz")
        lists = json.loads((root / category / "set_lists" / f"set_lists_{subset}.json").read_text())
        assert [s["sequence_name"] for s in sequences] == list(dict.fromkeys(f["sequence_name"] for f in frames))
        for sequence in sequences:
            assert list(sequence) == SEQUENCE_KEYS
            assert sequence["category"] == category and sequence["video"] is sequence["point_cloud"] is None
            assert [part.isdigit() for part in sequence["sequence_name"].split("_")] == [True] * 3
        for frame in frames:
            assert list(frame) == FRAME_KEYS and frame["depth"] is frame["mask"] is None
            view = frame["viewpoint"]
            assert set(view) - {"intrinsics_format"} == {"R", "T", "focal_length", "principal_point"}
            assert view.get("intrinsics_format") in twin.FORMATS
            shapes = [np.shape(view[key]) for key in ("R", "T", "focal_length", "principal_point")]
            assert shapes == [(3, 3), (3,), (2,), (2,)]
            path = root / frame["image"]["path"]
            assert path.parts[-3:-1] == (frame["sequence_name"], "images") and path.parts[-4] == category
            if path.exists():
                with Image.open(path) as image:
                    assert [image.height, image.width] == frame["image"]["size"] and min(image.size) == 96
        listed = [tuple(entry) for split in ("train", "val", "test") for entry in lists[split]]
        assert all(lists.values())
        assert sorted(listed) == sorted((f["sequence_name"], f["frame_number"], f["image"]["path"]) for f in frames)
    assert not list(root.rglob("*.part"))


def test_files_are_the_planned_ones(root: Path) -> None:
    expected = {s.image_path(t) for s in TINY for t in range(s.frames) if t not in s.no_image}
    assert {name for name in contents(root) if name.endswith(".jpg")} == expected


def test_awkward_cases_are_in_the_plan() -> None:
    frames = sum(sequence.frames for sequence in SMALL)
    no_image = sum(len(sequence.no_image) for sequence in SMALL)
    no_annotation = sum(len(sequence.no_annotation) for sequence in SMALL)
    assert frames == 4 * 12 * 60 and no_image > 5 and no_annotation > 5
    assert (no_image + no_annotation) / frames == pytest.approx(0.02, abs=0.008)  # three standard deviations
    assert {sequence.intrinsics_format for sequence in SMALL} == set(twin.FORMATS)
    assert {np.sign(sequence.height - sequence.width) for sequence in SMALL} == {-1, 0, 1}
    assert sum(sequence.height > sequence.width for sequence in SMALL) > len(SMALL) / 2
    assert [sequence.quality for sequence in SMALL].count(None) == 1
    regular = [sequence.suffix_T == tuple(range(1, sequence.frames + 1)) for sequence in SMALL]
    assert regular.count(False) == 1

    annotations = {sequence: synthetic_co3d.frame_annotations(sequence) for sequence in SMALL}
    null = {sequence for sequence, frames in annotations.items() if any(f["viewpoint"] is None for f in frames)}
    assert len(null) == 1
    for sequence, listed in annotations.items():
        numbers = [frame["frame_number"] for frame in listed]
        assert numbers == [t for t in range(sequence.frames) if t not in sequence.no_annotation]
    scales = [turntable.random_similarity(sequence.rng("world")).scale for sequence in SMALL]
    assert 0.2 <= min(scales) < 0.5 and 8 < max(scales) <= 20


# Determinism


def test_same_seed_same_bytes_with_any_number_of_workers(root: Path, tmp_path: Path) -> None:
    synthetic_co3d.generate(tmp_path, "tiny", workers=2, progress=False)
    assert contents(tmp_path) == contents(root)


def test_other_seed_other_pictures_and_poses(root: Path) -> None:
    for ours, theirs in zip(TINY, twin.plan(twin.SIZES["tiny"], 1), strict=True):
        assert ours.name != theirs.name
        assert not np.array_equal(picture(ours, 0), picture(theirs, 0))
        assert synthetic_co3d.frame_annotations(ours)[0] != synthetic_co3d.frame_annotations(theirs)[0]


def test_files_hold_the_frames_of_their_numbers(root: Path) -> None:
    """In the sequence whose files are numbered otherwise than its frames, too."""
    for sequence in TINY:
        for t in (1, 9):
            if t in sequence.no_image:
                continue
            with Image.open(root / sequence.image_path(t)) as image:
                difference_HxWx3 = np.abs(np.asarray(image, float) - picture(sequence, t))
                neighbour_HxWx3 = np.abs(np.asarray(image, float) - picture(sequence, t + 1))
            assert 3 * difference_HxWx3.mean() < neighbour_HxWx3.mean()  # what is left is JPEG's


# Motion and pose noise


def motion(cameras: list[Camera]) -> tuple[np.ndarray, np.ndarray]:
    """Rotation in degrees and translation relative to the distance, from each frame to the next."""
    rotation_Tx3x3 = np.stack([camera.rotation_3x3 for camera in cameras])
    centre_Tx3 = np.stack([camera.centre_3 for camera in cameras])
    trace_T = np.einsum("tij,tij->t", rotation_Tx3x3[1:], rotation_Tx3x3[:-1])
    angle_T = np.degrees(np.arccos(np.clip((trace_T - 1) / 2, -1, 1)))
    return angle_T, np.linalg.norm(np.diff(centre_Tx3, axis=0), axis=1) / np.linalg.norm(centre_Tx3[1:], axis=1)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_motion_is_that_of_co3d(size: str) -> None:
    pairs = [motion(twin.cameras(sequence)) for sequence in twin.plan(twin.SIZES[size], 0)]
    for angle_T, move_T in pairs:
        assert 1.2 < np.median(angle_T) < 2.3 and angle_T.max() < 5
        assert 0.019 < np.median(move_T) < 0.036
    angle_T, move_T = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    assert 1.3 < np.median(angle_T) < 2.2 and 0.02 < np.median(move_T) < 0.035


def test_cameras_stay_in_the_room_and_outside_the_objects() -> None:
    for sequence in SMALL:
        still_life = twin.scene(sequence)
        centre_Tx3 = np.stack([camera.centre_3 for camera in twin.cameras(sequence)])
        assert np.abs(centre_Tx3[:, :2]).max() < still_life.half and centre_Tx3[:, 2].max() < still_life.height
        for primitive in still_life.primitives:
            reach = np.sqrt(3) * np.linalg.norm(primitive.linear_3x3, 2)
            assert np.linalg.norm(centre_Tx3 - primitive.centre_3, axis=1).min() > reach


def test_pose_noise_falls_with_quality_and_the_top_quarter_is_exact() -> None:
    scored = sorted((sequence for sequence in SMALL if sequence.quality), key=lambda sequence: sequence.quality or 0)
    cut = np.quantile([sequence.quality for sequence in scored], 0.75)
    error = []
    for sequence in scored:
        pairs = zip(twin.cameras(sequence), twin.annotated_cameras(sequence), strict=True)
        turns = [np.linalg.norm(true.rotation_3x3 - noisy.rotation_3x3) for true, noisy in pairs]
        error.append(np.degrees(np.mean(turns) / np.sqrt(2)))  # |R - R'| = sqrt(2) angle for small angles
        assert (error[-1] == 0) == (sequence.quality >= cut)
    noisy = [value for value in error if value]
    assert len(error) - len(noisy) == 12 and 0.3 < noisy[0] < 3
    half = len(noisy) // 2
    assert np.mean(noisy[:half]) > 2 * np.mean(noisy[half:])


# Restarts and refusals


def test_interrupted_run_continues(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[Any] = []
    allowed = 60

    def limited(*arguments: Any) -> np.ndarray:
        if len(rendered) == allowed:
            raise KeyboardInterrupt
        rendered.append(arguments)
        return render(*arguments)

    monkeypatch.setattr(synthetic_co3d, "render", limited)
    with pytest.raises(KeyboardInterrupt):
        synthetic_co3d.generate(tmp_path, "tiny", progress=False)
    first, second = dict.fromkeys(sequence.category for sequence in TINY)
    assert (tmp_path / first / "frame_annotations.jgz").exists()
    assert not (tmp_path / second / "frame_annotations.jgz").exists()

    allowed = sum(sequence.frames - len(sequence.no_image) for sequence in TINY)
    synthetic_co3d.generate(tmp_path, "tiny", progress=False)
    assert len(rendered) == allowed  # no frame twice
    assert contents(tmp_path) == contents(root)


def test_other_data_is_refused_in_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(root)
    assert synthetic_co3d.main(["--out", str(root), "--size", "tiny", "--seed", "1"]) == 2
    assert synthetic_co3d.main(["--out", str(root), "--size", "small"]) == 2
    (tmp_path / "category_to_subset_name_list.json").write_text("{}")
    assert synthetic_co3d.main(["--out", str(tmp_path), "--size", "tiny"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("choose another folder" in line for line in lines)
    assert contents(root) == before and len(contents(tmp_path)) == 1
    with pytest.raises(UserError, match="tiny, small, full"):
        synthetic_co3d.generate(tmp_path, "huge")


def test_progress_ends_with_all_frames(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synthetic_co3d.main(["--out", str(root), "--size", "tiny"]) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("96/96 frames")
