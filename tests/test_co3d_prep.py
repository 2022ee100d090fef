"""data_prep.co3d: which sequences it takes, what it stores of them, and real posed photographs."""

import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from data_prep import co3d, co3d_shard, co3d_source
from niso.data import records
from niso.errors import UserError
from niso.geometry import camera
from tests.co3d_tree import EVERYTHING, SIZE, make_frame, make_tree, read_annotations, write_annotations

_FOX = pathlib.Path(__file__).parents[2] / "shared" / "data" / "fox_co3d"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("co3d"))


# ---- selection -------------------------------------------------------------------------------------------------------


def test_the_published_rule_of_selection():
    rng = np.random.default_rng(1)
    scores: co3d_source.Scores = {
        "b": {f"{n}_1_{m}": float(rng.uniform(0, 1)) for n in (2, 10, 9) for m in range(20)},
        "a": {f"{n}_0_0": 0.9 + n / 1000 for n in range(29)},
        "poor": {f"{n}_0_0": 2.0 for n in range(9)} | {"none_0_0": None},
    }
    splits, left_out = co3d_source.select(scores, 0.25, 0.1)
    pooled = sorted(q for names in scores.values() for q in names.values() if q is not None)
    position = 0.25 * (len(pooled) - 1)
    low = int(position)
    threshold = pooled[low] + (position - low) * (pooled[low + 1] - pooled[low])
    expected: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for category in ("a", "b"):
        kept = sorted(
            (n for n, q in scores[category].items() if q is not None and q >= threshold), key=lambda name: name.split("_")
        )
        count = int(0.1 * len(kept))
        expected["train"] += [(category, name) for name in kept[:-count]]
        expected["test"] += [(category, name) for name in kept[-count:]]
    assert {split: [(s.category, s.name) for s in part] for split, part in splits.items()} == expected
    assert len([s for s in splits["test"] if s.category == "a"]) == 2  # int(0.1 * 29), not rounded
    assert splits["train"][0].quality == scores["a"]["0_0_0"]
    assert left_out["sequences without quality score"] == 1
    assert left_out["categories without test part"] == 1
    assert left_out["sequences of categories without test part"] == 9
    kept_count = sum(map(len, expected.values()))
    assert left_out["sequences below the quality quantile"] == len(pooled) - 9 - kept_count > 0


def test_names_are_ordered_by_their_parts_and_the_quantile_is_kept():
    # "10_..." sorts before "9_..." because parts are strings; "1_2" before "10_1" though "_" sorts after "0".
    scores = {"a": {"9_0": 1.0, "10_1": 1.0, "1_2": 1.0, "1_10": 1.0}}
    splits, _ = co3d_source.select(scores, 0.75, 0.25)
    assert [s.name for s in splits["train"] + splits["test"]] == ["1_10", "1_2", "10_1", "9_0"]
    scores = {"a": {"0_0": 1.0, "1_0": 2.0, "2_0": 3.0, "3_0": 4.0, "4_0": 5.0}}
    splits, _ = co3d_source.select(scores, 0.75, 0.5)
    assert [s.name for s in splits["train"] + splits["test"]] == ["3_0", "4_0"]  # the quantile is 4.0, and is kept


def test_an_empty_selection_says_which_option_helps():
    with pytest.raises(UserError, match=r"needs 10 sequences .* largest keeps 2; .*--top_quantile 0\.5.*--splits"):
        co3d_source.select({"a": {"0": 1.0, "1": 2.0, "2": 3.0}}, 0.5, 0.1)
    with pytest.raises(UserError, match=r"no sequence has a finite viewpoint_quality_score.*--splits"):
        co3d_source.select({"a": {"0": None}}, 0.5, 0.1)


def test_null_and_non_finite_scores_are_none(tmp_path):
    write_annotations(tmp_path, "a", [], {"x": None, "y": float("nan"), "z": float("inf"), "w": 1.5})
    assert co3d_source.read_scores(tmp_path, ["a"]) == {"a": {"x": None, "y": None, "z": None, "w": 1.5}}


# ---- what is stored --------------------------------------------------------------------------------------------------


def test_every_frame_is_stored_with_its_own_image_and_camera(tree, tmp_path):
    manifest = co3d.prepare(tree, tmp_path / "out", **EVERYTHING)
    assert manifest == records.Manifest.read(tmp_path / "out") and manifest.size == SIZE
    assert not any(manifest.left_out.values())
    found = set()
    for split, count in (("train", 8), ("test", 4)):
        reader = records.Reader(tmp_path / "out", split, records.FRAME)
        assert len(reader.sequences) == count and len(manifest.splits[split]) == 3
        for sequence in reader.sequences:
            annotations = read_annotations(tree, sequence.category)
            examples = reader.read(sequence.shard, range(sequence.start, sequence.start + sequence.length))
            assert [int(e["frame_number"]) for e in examples] == list(range(5))
            for example in examples:
                _check_example(tree, example, annotations[sequence.name, int(example["frame_number"])])
            found.add((sequence.category, sequence.name))
    assert len(found) == 12


def _check_example(root, example, annotation):
    height, width = annotation["image"]["size"]
    image = Image.open(io.BytesIO(example["image_jpeg"]))
    assert (image.size, image.mode, image.format) == ((SIZE, SIZE), "RGB", "JPEG")
    original = Image.open(root / annotation["image"]["path"]).convert("RGB")
    square = original.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=(0, 5, 30, 35))
    buffer = io.BytesIO()
    square.save(buffer, "JPEG", quality=95)
    assert example["image_jpeg"] == buffer.getvalue()
    view = annotation["viewpoint"]
    r_3x3, t_3 = camera.pytorch3d_from_camera_to_world(example["camera_to_world_4x4"])
    np.testing.assert_allclose(r_3x3, view["R"], atol=1e-12)
    np.testing.assert_allclose(t_3, view["T"], atol=1e-12)
    half = min(height, width) / 2
    scale = np.array([half, half] if view.get("intrinsics_format") == "ndc_isotropic" else [width / 2, height / 2])
    k_3x3 = example["intrinsics_3x3"]
    np.testing.assert_allclose(np.diag(k_3x3)[:2], view["focal_length"] * scale * SIZE / 30, rtol=1e-12)
    centre = np.array([15, 20.5]) - view["principal_point"] * scale - [0, 5]
    np.testing.assert_allclose(k_3x3[:2, 2], centre * SIZE / 30, rtol=1e-12)


def test_large_jpegs_are_decoded_small_without_a_visible_difference():
    # A smooth picture with edges, of odd size, so that the reduced decode ends in a padded column.
    y, x = np.mgrid[:901, :603] / 60.0
    pixels = np.stack([np.sin(3 * x + y), np.sign(np.sin(2 * y - x)), np.cos(x * y / 3)], -1) * 90 + 128
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=95)
    frame = co3d_source.Frame("", 901, 603, 0, None)
    for size in (150, 75, 37, 200):
        small = co3d_shard._oriented(Image.open(buffer), frame, size)
        assert 2 * size <= min(small.size) and (min(small.size) < 603) == (size <= 150)
        got = np.asarray(co3d_shard._resize_square(small, frame, size), float)
        full = Image.open(buffer).crop(camera.centre_square(901, 603))
        want = np.asarray(full.resize((size, size), Image.Resampling.LANCZOS), float)
        # 45 dB is a root mean square of 1.4 grey values; half a source pixel of shift gives less than 35 dB.
        assert 10 * np.log10(255**2 / max(np.mean((got - want) ** 2), 1e-9)) > 45


def _spoil(root, frames):
    """Gives each of the first frames one defect; returns the count expected for every reason."""

    def image(i):
        return root / frames[i]["image"]["path"]

    frames[0]["viewpoint"] = None
    frames[1]["viewpoint"]["T"][1] = float("nan")
    frames[2]["viewpoint"]["focal_length"][0] = float("inf")
    image(3).unlink()
    image(4).write_bytes(b"not an image")
    image(5).write_bytes(image(5).read_bytes()[:-300])
    image(6).write_bytes(b"")
    frames[7]["image"]["size"] = [41, 31]
    frames[8]["image"]["size"] = [30, 41]  # exchanged, and no EXIF tag that says so
    return {
        "frames without viewpoint": 1,
        "frames with non-finite pose or intrinsics": 2,
        "frames with missing image": 1,
        "frames with unreadable image": 3,
        "frames with image of another size than annotated": 2,
        "sequences with fewer than 2 usable frames": 3,
    }


def test_what_is_unusable_is_left_out_and_counted(tmp_path, capsys):
    rng = np.random.default_rng(2)
    frames = [make_frame(tmp_path, "cup", "1_1_1", n, rng, suffix=99 - 3 * n) for n in range(12)]
    expected = _spoil(tmp_path, frames)
    frames += [make_frame(tmp_path, "cup", "2_1_1", n, rng) for n in range(3)]
    frames += [make_frame(tmp_path, "cup", "3_1_1", 0, rng)]  # one frame only; 4_1_1 and 5_1_1 have none at all
    scores = {f"{n}_1_1": 1.0 for n in range(1, 6)}
    write_annotations(tmp_path, "cup", frames, scores)
    (tmp_path / "list.json").write_text(json.dumps({"train": {"cup": list(scores)}, "test": {"cup": ["2_1_1"]}}))
    manifest = co3d.prepare(tmp_path, tmp_path / "out", splits=tmp_path / "list.json", size=SIZE, shards=5)
    assert manifest.left_out == expected
    printed = capsys.readouterr().out
    assert all(f"left out: {count} {reason}" in printed for reason, count in expected.items())
    train = records.Reader(tmp_path / "out", "train", records.FRAME)
    assert [(s.name, s.length) for s in train.sequences] == [("1_1_1", 3), ("2_1_1", 3)]
    first = train.sequences[0]
    assert [int(e["frame_number"]) for e in train.read(first.shard, range(3))] == [9, 10, 11]
    assert [s.records for s in train.manifest.splits["train"]] == [3, 3, 0, 0, 0]  # an empty shard is a shard
    assert [s.name for s in records.Reader(tmp_path / "out", "test", records.FRAME).sequences] == ["2_1_1"]


def test_a_picture_turned_by_exif_follows_the_annotation(tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (6, 4, 3)).repeat(10, 0).repeat(10, 1).astype(np.uint8)
    upright = Image.fromarray(pixels)  # 60 rows, 40 columns, as annotated
    frame = co3d_source.Frame("a.png", 60, 40, 0, None)
    upright.save(tmp_path / "a.png")
    want = np.asarray(co3d_shard._load_square(tmp_path / "a.png", frame, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be rotated by 270 degrees before it is shown
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(co3d_shard._load_square(tmp_path / "a.png", frame, 40), want)
    upright.save(tmp_path / "a.png", exif=exif)  # already as annotated: the tag is ignored
    np.testing.assert_array_equal(co3d_shard._load_square(tmp_path / "a.png", frame, 40), want)
    upright.convert("L").save(tmp_path / "a.png")
    assert co3d_shard._load_square(tmp_path / "a.png", frame, 40).mode == "RGB"


def test_a_disk_that_fails_is_not_an_unreadable_image(tmp_path):
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*a\.jpg: Is a directory"):
        co3d_shard._load_square(tmp_path / "a.jpg", co3d_source.Frame("a.jpg", 4, 4, 0, None), 4)


def test_shards_are_even_and_bounded():
    def sizes(n, shards=None):
        plan = co3d._plan("train", [co3d_source.Selected("a", str(i), None) for i in range(n)], shards)
        assert [s.name for part in plan.values() for s in part] == [str(i) for i in range(n)]
        return [len(part) for part in plan.values()]

    assert sizes(96) == [8] * 12 and sizes(3) == [3] and sizes(17) == [5, 6, 6] and sizes(2, 5) == [1, 1]
    assert len(sizes(8165)) == 1021 and len(sizes(9000)) == 1024
    assert next(iter(co3d._plan("test", [co3d_source.Selected("a", "b", None)] * 96, None))) == ("test-00000-of-00012.array_record")


# ---- real photographs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fox(tmp_path_factory):
    if not _FOX.is_dir():
        pytest.skip(f"no real CO3Dv2 folder at {_FOX}")
    folder = tmp_path_factory.mktemp("fox")
    (folder / "list.json").write_text(json.dumps({split: {"fox": ["1_1_50"]} for split in ("train", "test")}))
    co3d.prepare(_FOX, folder / "out", splits=folder / "list.json", progress=False)
    reader = records.Reader(folder / "out", "test", records.FRAME)
    return reader.read(reader.sequences[0].shard, range(reader.sequences[0].length))


def test_real_poses_equal_their_source_up_to_one_similarity(fox):
    original = json.loads((_FOX / "original_poses.json").read_text())
    # The source's cameras look along -z with y up (OpenGL); turning y and z gives OpenCV's.
    source_4x4 = np.array(original["original_c2w_opengl"]) @ np.diag([1.0, -1, -1, 1])
    pose_4x4 = np.stack([example["camera_to_world_4x4"] for example in fox])
    assert pose_4x4.shape == source_4x4.shape == (50, 4, 4)

    def error(source_4x4):
        """Largest deviation after the best similarity (Umeyama 1991) of the centres; positions over their spread."""
        a, b = source_4x4[:, :3, 3], pose_4x4[:, :3, 3]
        a0, b0 = a - a.mean(0), b - b.mean(0)
        u, s, vt = np.linalg.svd(b0.T @ a0)
        sign = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
        turn = (u * sign) @ vt
        scale = (s * sign).sum() / (a0**2).sum()
        rotation = np.abs(turn @ source_4x4[:, :3, :3] - pose_4x4[:, :3, :3]).max()
        return max(rotation, np.abs(scale * a0 @ turn.T - b0).max() / b0.std()), scale

    deviation, scale = error(source_4x4)
    print(f"largest deviation {deviation:.1e}")
    assert deviation < 1e-12  # two roundings of numbers of size ten; measured 5e-15
    assert scale == pytest.approx(original["scale"], rel=1e-12)
    assert error(np.array(original["original_c2w_opengl"]))[0] > 0.1
    assert error(np.linalg.inv(source_4x4))[0] > 0.1


def test_real_intrinsics_and_images_are_plausible(fox):
    for example in fox:
        k_3x3 = example["intrinsics_3x3"]
        # 711 x 400, focal length 2.547 of half the width: 183.4 pixels of 144 (a phone's 43 degrees).
        np.testing.assert_allclose(np.diag(k_3x3)[:2], 2.546 * 72, rtol=2e-3)
        np.testing.assert_allclose(k_3x3[:2, 2], 72, atol=4)
        pixels = np.asarray(Image.open(io.BytesIO(example["image_jpeg"])))
        assert pixels.shape == (144, 144, 3) and pixels.std() > 20
    mean_bytes = np.mean([len(example["image_jpeg"]) for example in fox])
    assert 8_000 < mean_bytes < 18_000
