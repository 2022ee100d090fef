"""data_prep.images: what is cut from pictures of every kind, how they are split, and runs that are broken off or repeated."""

import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from data_prep import image_shard, images, samples, synthetic_images
from niso.data import records
from niso.errors import UserError
from tests.prep_runs import check_a_killed_run, contents, noisy_pictures

SIZE = 4
# Four quarters of one colour each: what is upright, and what is RGB, shows.
COLOURS = np.array([[[250, 20, 30], [20, 240, 40]], [[40, 30, 230], [200, 200, 60]]], np.uint8)


def quarters(height: int = 24, width: int = 24) -> Image.Image:
    return Image.fromarray(COLOURS.repeat(height // 2, 0).repeat(width // 2, 1))


def corners(image_HxWxC: np.ndarray) -> np.ndarray:
    """The colours of the corners, 2 x 2 x 3: the resampled edges between the quarters lie elsewhere."""
    return image_HxWxC[:: SIZE - 1, :: SIZE - 1].astype(int)


def write_odd(root: pathlib.Path) -> dict[str, np.ndarray | None]:
    """Pictures of every kind; for each the 2 x 2 x 3 colours it must have, or None where it cannot be read."""
    root.mkdir()
    grey = np.asarray(quarters().convert("L"))
    want: dict[str, np.ndarray | None] = {"rgb.png": COLOURS, "wide.jpg": COLOURS, "palette.bmp": COLOURS, "loud.JPEG": COLOURS}
    quarters().save(root / "rgb.png")
    wide = Image.new("RGB", (60, 24))
    wide.paste(quarters(), (18, 0))
    wide.save(root / "wide.jpg", quality=95)
    quarters().quantize(4).save(root / "palette.bmp")
    quarters(800, 800).save(root / "loud.JPEG", quality=95)  # decoded at an eighth
    Image.fromarray(grey).save(root / "grey.png")
    want["grey.png"] = np.asarray(Image.fromarray(COLOURS).convert("L").convert("RGB"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(root / "deep.png")
    want["deep.png"] = want["grey.png"]
    quarters().convert("CMYK").save(root / "ink.jpg", quality=95)
    want["ink.jpg"] = COLOURS
    clear = quarters().convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 12, 12))
    clear.save(root / "clear.webp", lossless=True)
    want["clear.webp"] = np.where(np.arange(4).reshape(2, 2, 1) == 0, 255, COLOURS)
    indexed = quarters().quantize(4)
    indexed.save(root / "indexed.png", transparency=int(np.asarray(indexed)[0, 0]))
    want["indexed.png"] = want["clear.webp"]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees before it is shown
    quarters(60, 24).transpose(Image.Transpose.ROTATE_90).save(root / "turned.jpg", exif=exif, quality=95)
    want["turned.jpg"] = COLOURS
    Image.fromarray(np.full((3, 5, 3), 77, np.uint8)).save(root / "tiny.png")
    want["tiny.png"] = np.full((2, 2, 3), 77)
    quarters(400, 400).save(root / "cut.jpg")
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:-900])
    (root / "text.png").write_text("not a picture")
    (root / "empty.png").touch()
    (root / "notes.txt").write_text("nobody reads this")
    (root / ".hidden.png").write_text("nor this")
    return want | {"cut.jpg": None, "text.png": None, "empty.png": None}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> pathlib.Path:
    return noisy_pictures(tmp_path_factory.mktemp("images") / "tree")


EVERYTHING = {"size": SIZE, "shards": 3, "test_fraction": 0.3, "crops": 2, "progress": False}


@pytest.fixture(scope="module")
def unbroken(tree, tmp_path_factory):
    """What an unbroken run on the tree leaves behind."""
    out = tmp_path_factory.mktemp("out") / "records"
    images.prepare(tree, out, **EVERYTHING)
    return contents(out)


def stored(out: pathlib.Path, split: str) -> list[np.ndarray]:
    reader = records.Reader(out, split, records.still(SIZE))
    return [one["image_HxWxC"] for s in reader.sequences for one in reader.read(s.shard, range(s.start, s.start + s.length))]


# ---- what is stored --------------------------------------------------------------------------------------------------


def test_pictures_of_every_kind(tmp_path, capsys):
    root, out = tmp_path / "odd", tmp_path / "out"
    (tmp_path / "odd").mkdir()
    want = write_odd(root / "train")
    (root / "test").mkdir()
    quarters().save(root / "test" / "one.png")
    manifest = images.prepare(root, out, size=SIZE)
    assert manifest == records.Manifest.read(out) and (manifest.dataset, manifest.size) == ("images", SIZE)
    readable = sorted(name for name, colours in want.items() if colours is not None)
    found = dict(zip(readable, stored(out, "train"), strict=True))
    for name, image_HxWxC in found.items():
        # Lanczos overshoots beside an edge, by 8 levels here; JPEG and its subsampled colours add to that.
        assert np.abs(corners(image_HxWxC) - want[name]).max() <= (24 if name.lower().endswith(("jpg", "jpeg")) else 10), name
    assert manifest.left_out == {"unreadable images": 3}
    printed = capsys.readouterr().out
    assert "left out: 3 unreadable images" in printed and "train: 11 images" in printed and "test: 1 images" in printed
    for name in ("cut.jpg", "text.png", "empty.png"):
        assert f"left out: train/{name} (" in printed
    assert "notes.txt" not in printed and "hidden" not in printed


def test_the_centre_square_is_resized_once(tree, tmp_path):
    images.prepare(tree, tmp_path / "out", size=SIZE, progress=False)
    for split, names in images.choose(tree, None, 0)[0].items():
        for name, image_HxWxC in zip(names, stored(tmp_path / "out", split), strict=True):
            picture = Image.open(tree / name)
            left, top = (picture.width - min(picture.size)) // 2, (picture.height - min(picture.size)) // 2
            box = (left, top, left + min(picture.size), top + min(picture.size))
            np.testing.assert_array_equal(image_HxWxC, picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box))


def test_random_squares_lie_inside_and_their_sides_are_log_uniform():
    boxes = np.array([image_shard._box(300, 200, 16, *image_shard.random_square(0, "a.png", n)) for n in range(4000)])
    left, top, right, bottom = boxes.T
    side = right - left
    np.testing.assert_allclose(bottom - top, side, rtol=1e-12)
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 300 and bottom.max() <= 200
    assert side.min() >= 16 and side.max() <= 200
    # Means of 4,000 uniform numbers: a standard deviation of 0.0046, five of them.
    for uniform in (np.log(side / 16) / np.log(200 / 16), left / (300 - side), top / (200 - side)):
        assert abs(uniform.mean() - 0.5) < 0.023 and abs((uniform < 0.25).mean() - 0.25) < 0.035
    assert image_shard._box(5, 3, 16, 0.3, 0.5, 0.5) == (1, 0, 4, 3)  # enlarged


def test_random_squares_depend_on_seed_picture_and_number():
    chosen = {
        image_shard.random_square(seed, name, n)
        for seed in (0, 1)
        for name in ("a.png", "b/a.png", "\udcff.png")
        for n in (0, 1, 10)
    }
    assert len(chosen) == 18
    # Written down: if they move, records made before and after differ under the same options.
    assert image_shard.random_square(0, "a.png", 0) == pytest.approx((0.0415462, 0.5739016, 0.7127356), abs=1e-6)


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_pictures_are_dealt_by_their_names(tree, tmp_path, monkeypatch):
    splits, dealt = images.choose(tree, 0.3, 0)
    assert dealt and len(splits["train"]) + len(splits["test"]) == 40 and not set(splits["train"]) & set(splits["test"])
    assert 4 <= len(splits["test"]) <= 20
    (tmp_path / "tree").symlink_to(tree)  # a folder elsewhere, and pictures that are gone, move no others
    gone = splits["test"][0]
    find = images.find
    monkeypatch.setattr(images, "find", lambda root: (name for name in find(root) if name != gone))
    fewer, _ = images.choose(tmp_path / "tree", 0.3, 0)
    assert fewer == {"train": splits["train"], "test": splits["test"][1:]}
    assert images.choose(tree, 0.3, 1)[0] != fewer


def test_a_tree_may_have_its_own_splits(tree, tmp_path):
    for held_out, more in (("val", ()), ("test", ()), ("val", ("test",))):
        root = tmp_path / f"{held_out}{more}"
        for folder in ("train", held_out, *more):
            (root / folder / "deep").mkdir(parents=True)
            quarters().save(root / folder / "deep" / f"{folder}.png")
        splits, dealt = images.choose(root, None, 0)
        assert splits == {"train": ["train/deep/train.png"], "test": [f"{held_out}/deep/{held_out}.png"]} and not dealt
        with pytest.raises(UserError, match=rf"train/ and {held_out}/: leave out --test_fraction"):
            images.choose(root, 0.1, 0)
        (root / held_out / "deep" / f"{held_out}.png").unlink()
        with pytest.raises(UserError, match=rf"no picture .* in {re.escape(str(root / held_out))}, which is to be the test split"):
            images.choose(root, None, 0)


def test_links_to_folders_above_end(tree, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "a" / "linked").symlink_to(tree)
    assert len(list(images.find(tmp_path))) == 40


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_killed_run_continues_and_ends_with_the_same_bytes(tree, unbroken, tmp_path):
    out = tmp_path / "out"
    arguments = f"{str(tree)!r}, {str(out)!r}, size={SIZE}, shards=3, test_fraction=0.3, crops=2"
    check_a_killed_run("images", arguments, out, lambda: images.prepare(tree, out, **EVERYTHING), unbroken)


def test_several_workers_write_the_same_bytes(tree, unbroken, tmp_path, capsys):
    images.prepare(tree, tmp_path / "out", **EVERYTHING | {"workers": 2, "progress": True})
    assert contents(tmp_path / "out") == unbroken
    assert "6/6 shards" in (error := capsys.readouterr().err) and "images/s" in error


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_a_damaged_shard_is_made_again_and_no_other(tree, unbroken, tmp_path, damage, monkeypatch):
    for name, content in unbroken.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    victim = tmp_path / "train-00001-of-00003.array_record"
    victim.unlink() if damage == "deleted" else victim.write_bytes(victim.read_bytes()[:-10])
    built, build = [], image_shard.build
    monkeypatch.setattr(image_shard, "build", lambda job: built.append(job.file) or build(job))
    images.prepare(tree, tmp_path, **EVERYTHING)
    assert contents(tmp_path) == unbroken and built == [victim.name]


def _main(root, out, *more) -> int:
    return images.main(["--root", str(root), "--out", str(out), "--size", str(SIZE), "--workers", "1", *more])


def test_a_finished_folder_says_so_and_refuses_other_options(tree, tmp_path, capsys):
    out, own = tmp_path / "out", tmp_path / "own"
    assert _main(tree, out) == 0
    capsys.readouterr()
    assert _main(tree, out) == 0
    assert capsys.readouterr().out.strip() == f"{out}: nothing to do, the records are complete"
    own.mkdir()
    quarters().save(own / "one.png")
    for root, more, words in (
        (tree, ["--size", "8"], "size 4 then, 8 now"),
        (tree, ["--crops", "3"], "crops 0 then, 3 now"),
        (tree, ["--seed", "3"], "seed 0 then, 3 now"),
        (tree, ["--test_fraction", "0.4"], "test_fraction 0.1 then, 0.4 now"),
        (tree / "class 0", [], "has other pictures than then"),
    ):
        assert _main(root, out, *more) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and "another --out" in error


def test_every_mistake_is_one_line(tree, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    single = tmp_path / "single"
    single.mkdir()
    quarters().save(single / "one.png")
    broken = tmp_path / "broken"
    for split in ("train", "test"):
        (broken / split).mkdir(parents=True)
        (broken / split / "text.png").write_text("no picture")
    for root, more, words in (
        (tmp_path / "nowhere", [], "no folder"),
        (tmp_path / "empty", [], "no picture in"),
        (single, [], "of 1 pictures in"),
        (broken, [], "no usable image in split train (left out: 2 unreadable images)"),
        (tree, ["--size", "0"], "--size is 0"),
        (tree, ["--crops", "-1"], "--crops is -1"),
        (tree, ["--test_fraction", "1"], "--test_fraction is 1.0"),
        (tree, ["--shards", "0"], "--shards is 0"),
    ):
        assert _main(root, tmp_path / "out", *more) == 2, words
        error = capsys.readouterr().err.splitlines()
        assert words in error[-1] and len(error) == 1 + (root is broken)  # one of progress
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_disk_that_fails_is_not_an_unreadable_picture(tree, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "train" / "a.png").symlink_to(tmp_path / "gone.png")
    quarters().save(tmp_path / "test" / "b.png")
    with pytest.raises(UserError, match=r"cannot read .*a\.png: No such file"):
        images.prepare(tmp_path, tmp_path / "out", size=SIZE, progress=False)


# ---- the built-in photographs ----------------------------------------------------------------------------------------


def test_the_strips_of_the_photographs_share_no_pixel(tmp_path):
    pytest.importorskip("sklearn")
    synthetic_images.generate(tmp_path, "tiny")
    splits, dealt = images.choose(tmp_path, None, 0)
    assert not dealt and [len(splits[split]) for split in ("train", "test")] == [8, 2]
    area = {split: sum(np.prod(Image.open(tmp_path / name).size) for name in names) for split, names in splits.items()}
    assert area == {"train": 2 * 427 * 512, "test": 2 * 427 * 128}
    for split, names in splits.items():
        assert {name.split("-")[1] for name in names} == {"0", "1"}, split
    strips = [np.asarray(Image.open(tmp_path / f"{'test' if s == 3 else 'train'}/photo-0-strip-{s}.png")) for s in range(5)]
    np.testing.assert_array_equal(np.concatenate(strips, axis=1), samples.photographs()[0])
