"""Data preparations in a bucket, sources and records: the bytes of a local run, whatever happens on the way.

Against an emulator on this machine; no bucket of the real thing was at hand.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
from gcsfs.retry import HttpError
from PIL import Image

from data_prep import co3d, homnist, images, mnist, shapes, synthetic_co3d
from niso import folders
from niso.data import datasets, records
from niso.errors import LostError
from tests import co3d_tree, shape_trees, test_mnist_prep
from tests.prep_runs import by_two_tasks, contents, noisy_pictures, refusal
from tests.test_bucket import bucket, fetch
from tests.test_homnist_prep import COPIES, STILL, write_mat
from tests.test_shapes_prep import as_obj, as_ply
from tests.test_stills import digit, write_records
from tests.toy_records import message


def pictures(root: pathlib.Path) -> pathlib.Path:
    """Some of them with names that are no URLs; one is none."""
    noisy_pictures(root)
    for name in ("a#12 %41?.PNG", "b~.jpg", ".hidden.png", "ü.webp"):
        Image.open(root / "class 0/0.png").save(root / name)
    (root / "class 0/broken.png").write_bytes(b"nothing of the kind")
    return root


def meshes(root: pathlib.Path) -> pathlib.Path:
    """In files of every kind; one is none."""
    shape_trees.write_tree(root)
    for kind, pose in (("off", 0), ("obj", 1), ("ply", 2)):
        vertex, face = shape_trees.pebble("egg", pose)
        path = root / "egg" / f"egg{pose}.{kind}"
        path.with_suffix(".npz").unlink()
        if kind == "off":
            shape_trees.write_off(path, vertex, face)
        else:
            path.write_bytes(as_ply(vertex, face) if kind == "ply" else as_obj(vertex, face).encode())
    chosen = shapes.choose(shapes.find(root, "folder", None), 2, 1, 0)["train"]
    (root / next(mesh.file for mesh in chosen if mesh.category == "stone")).write_bytes(b"nothing of the kind")
    return root


@dataclasses.dataclass(frozen=True)
class Case:
    """A preparation: what makes its source, and its options; what one run here leaves behind, and the source in the bucket."""

    module: Any
    make: Callable[[pathlib.Path], pathlib.Path]
    options: dict[str, Any]
    root: pathlib.Path = pathlib.Path()
    url: str = ""
    unbroken: dict[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.module.DATASET)

    @property
    def prepare(self) -> Callable[..., Any]:
        return functools.partial(self.module.prepare, **self.options)

    def flags(self, out: str, *more: str) -> list[str]:
        """The same as arguments of its command line."""
        words = [word for name, value in self.options.items() if name != "progress" for word in (f"--{name}", str(value))]
        return ["--root", self.url, "--out", out, "--workers", "1", *words, *more]


CASES = {
    case.name: case
    for case in (
        Case(co3d, co3d_tree.make_tree, co3d_tree.EVERYTHING),
        Case(images, pictures, {"size": 4, "shards": 3, "test_fraction": 0.3, "crops": 2, "progress": False}),
        Case(shapes, meshes, shape_trees.EVERYTHING),
        Case(mnist, test_mnist_prep.write_files, test_mnist_prep.EVERYTHING),
    )
}
MANY = ("co3d", "images", "shapes")  # those that are shared here; others can be, too


@functools.cache
def prepared(name: str, url: str, folder: pathlib.Path) -> Case:
    root = CASES[name].make(folder / "source")
    bucket().put(str(root), f"{url}/{name}/source", recursive=True)
    CASES[name].prepare(root, folder / "here")
    return dataclasses.replace(CASES[name], root=root, url=f"{url}/{name}/source", unbroken=contents(folder / "here"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pathlib.Path]:
    return functools.cache(lambda name: tmp_path_factory.mktemp(name))


@pytest.fixture
def case(request: pytest.FixtureRequest, bucket_url: str, folder: Callable[[str], pathlib.Path]) -> Case:
    return prepared(request.param, bucket_url, folder(request.param))


@pytest.fixture
def out(bucket_url: str, request: pytest.FixtureRequest) -> str:
    return f"{bucket_url}/out/{re.sub(r'[^a-z0-9]', '-', request.node.name)}"


def assert_as_here(case: Case, out: str, fetched: pathlib.Path) -> None:
    """Byte for byte; what is told of a file that was left out has its path in it."""
    here, there = str(case.root).encode(), case.url.encode()
    found = {name: content.replace(there, here) for name, content in contents(fetch(out, fetched)).items()}
    assert found == case.unbroken


# ---- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_one_run(case: Case, out: str, tmp_path: pathlib.Path) -> None:
    manifest = case.prepare(case.url, out)
    assert_as_here(case, out, tmp_path / "fetched")
    assert manifest == records.Manifest.read(out) and case.prepare(case.url, out) == manifest
    for split in manifest.splits:
        reader = records.Reader(out, split, datasets.find(case.name).schema(manifest.size))
        read = [one for s in reader.sequences for one in reader.read(s.shard, range(s.start, s.start + s.length))]
        assert len(read) == sum(shard.records for shard in manifest.splits[split]) > 0
    assert case.prepare(case.url, tmp_path / "down") == manifest
    assert contents(tmp_path / "down").keys() == case.unbroken.keys()


@pytest.mark.parametrize("case", MANY, indirect=True)
def test_two_tasks_and_a_merge(case: Case, out: str, tmp_path: pathlib.Path) -> None:
    """The first of them reads files of this machine."""
    assert case.prepare(case.root, out, task="0/2") is None and case.prepare(case.url, out, task="1/2") is None
    assert bucket().exists(f"{out}/parts/tasks.json") and not bucket().exists(f"{out}/manifest.json")
    assert case.prepare(case.url, out, merge=True) == records.Manifest.read(out)
    assert_as_here(case, out, tmp_path / "fetched")


@pytest.mark.parametrize("case", ["images"], indirect=True)
def test_processes(case: Case, out: str, tmp_path: pathlib.Path) -> None:
    assert case.module.main([*case.flags(out), "--workers", "2"]) == 0
    assert_as_here(case, out, tmp_path / "fetched")


@pytest.mark.parametrize("case", ["co3d"], indirect=True)
def test_a_list_of_splits(case: Case, out: str, tmp_path: pathlib.Path) -> None:
    names = sorted(co3d.co3d_source.read_scores(case.root, ["apple"])["apple"])
    (tmp_path / "list.json").write_text(json.dumps({"train": {"apple": names[:4]}, "test": {"apple": names[4:]}}))
    bucket().put(str(tmp_path / "list.json"), f"{out}-list/list.json")
    here = case.prepare(case.root, tmp_path / "here", splits=tmp_path / "list.json")
    assert case.prepare(case.url, out, splits=f"{out}-list/list.json") == here
    line = message(lambda: case.prepare(case.url, out, splits=f"{out}-list/none.json"))
    assert line == f"cannot read {out}-list/none.json: No such file or directory"


def test_homnist(bucket_url: str, out: str, tmp_path: pathlib.Path) -> None:
    mat = write_mat(tmp_path / "file.mat")
    digits = write_records(tmp_path / "mnist", {"train": (9,), "test": (2, 4)}, 28, "mnist", digit, STILL)
    bucket().put(str(mat), f"{bucket_url}/homnist/file.mat")
    bucket().put(digits, f"{bucket_url}/homnist/mnist", recursive=True)
    of_mnist = {"copies": COPIES, "shards": 3, "progress": False}
    homnist.prepare(f"{out}/mnist", mnist=f"{bucket_url}/homnist/mnist", **of_mnist)
    homnist.prepare(f"{out}/mat", mat=f"{bucket_url}/homnist/file.mat", shards=2, progress=False)
    homnist.prepare(tmp_path / "here/mnist", mnist=digits, **of_mnist)
    homnist.prepare(tmp_path / "here/mat", mat=mat, shards=2, progress=False)
    assert contents(fetch(out, tmp_path / "fetched")) == contents(tmp_path / "here")
    line = message(lambda: homnist.prepare(out, mat=f"{bucket_url}/homnist/none.mat"))
    assert f"no file {bucket_url}/homnist/none.mat: set --mat to the published" in line
    line = message(lambda: homnist.prepare(out, mnist=f"{bucket_url}/homnist/none"))
    assert f"no records of MNIST in {bucket_url}/homnist/none: make them with" in line


def test_the_published_layout_of_meshes(bucket_url: str, tmp_path: pathlib.Path) -> None:
    """What is found there; folders that have an object of their own are folders."""
    for name in ("base/a/x.ply", "base/a/y.ply", "base_sphere/a/x.ply", "base_sphere/a/y.ply"):
        for path in (name, *(f"{shapes.MOVED}/a/{name[-5]}/{number}.ply" for number in range(11))):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
    url = f"{bucket_url}/layout"
    bucket().put(str(tmp_path), url, recursive=True)
    for marker in ("", "base/", "base/a/", "base/empty/", f"{shapes.MOVED}/a/x/"):
        bucket().pipe_file(f"{url}/{marker}", b"")
    found = shapes.find(folders.named(url), "cshrec11", None)
    assert found == shapes.find(tmp_path, "cshrec11", None) and len(found["a"][0].moved) == 11
    assert sorted(folders.entries(folders.named(f"{url}/base"))) == [("a", True), ("empty", True)]


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def lost(*_: Any, **__: Any) -> None:
    raise HttpError({"code": 503, "message": "We encountered an\ninternal error"})


@pytest.mark.parametrize("case", ["images", "shapes"], indirect=True)
def test_a_lost_shard_is_one_line_and_the_same_command_ends_it(
    case: Case, out: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads, upload = [], folders.upload

    def fails_once(source: pathlib.Path, target: pathlib.Path) -> None:
        uploads.append(target.name)
        (lost if len(uploads) == 3 else upload)(source, target)

    monkeypatch.setattr(folders, "upload", fails_once)
    line = message(lambda: case.prepare(case.url, out))
    assert line == f"cannot write {out}/{uploads[2]}: We encountered an internal error, 503; run the same command again"
    assert case.module.main(case.flags(out)) == 0
    assert len(uploads) == 7 and len(set(uploads)) == 6  # what was finished is not made again
    assert_as_here(case, out, tmp_path / "fetched")


@pytest.mark.parametrize("case", MANY, indirect=True)
def test_a_source_that_is_lost_leaves_nothing_out(
    case: Case, out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no damaged picture or mesh: the records would depend on the day."""
    monkeypatch.setattr(folders._buckets(), "cat_file", lost)
    line = refusal(capsys, case.module.main, *case.flags(out), code=LostError.code)
    assert line.startswith(f"cannot read {case.url}/")
    assert line.endswith(": We encountered an internal error, 503; run the same command again")
    monkeypatch.setattr(folders._buckets(), "ls", lost)
    line = refusal(capsys, case.module.main, *case.flags(out), code=LostError.code)
    assert "We encountered an internal error, 503" in line and case.url in line


@pytest.mark.parametrize("case", ["images"], indirect=True)
def test_a_merge_sees_what_others_have_done(
    case: Case, out: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_two_tasks(case.module.prepare, case.url, out, **case.options)  # type: ignore[arg-type]
    first, last = f"{out}/train-00000-of-00003.array_record", f"{out}/test-00002-of-00003.array_record"
    whole = bucket().cat_file(first)
    bucket().pipe_file(first, bytes([whole[0] ^ 1]) + whole[1:])
    bucket().pipe_file(f"{out}/train-00000-of-00009.array_record", whole)
    assert "1 shards that are none of these records" in refusal(capsys, case.module.main, *case.flags(out, "--merge"))
    bucket().rm(f"{out}/train-00000-of-00009.array_record")
    bucket().rm(last)
    line = refusal(capsys, case.module.main, *case.flags(out, "--merge"))
    assert line.startswith(
        f"{out} cannot be merged, 2 of 6 shards are missing or damaged (train-00000-of-00003.array_record is not"
    )
    assert f"--root {case.url} --out {out}" in line and "--task I/2` for I = 0-1, then merge again" in line
    for number in range(2):
        assert case.module.main(case.flags(out, "--task", f"{number}/2")) == 0
    assert "use --task I/2" in refusal(capsys, case.module.main, *case.flags(out, "--task", "0/3", "--seed", "0"))
    assert case.module.main(case.flags(out, "--merge")) == 0
    assert_as_here(case, out, tmp_path / "fetched")
    assert "size 4 then, 5 now" in refusal(capsys, case.module.main, *case.flags(out, "--size", "5"))


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_what_is_not_there(case: Case, bucket_url: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = bucket().find(bucket_url)
    for root in (f"{bucket_url}/none", "gs://no-such-bucket/none", "gs://no-such-bucket"):
        line = message(lambda root=root: case.prepare(root, f"{bucket_url}/nothing"))
        assert f"no folder {root}: " in line or f" in {root}, with or without .gz" in line
    line = message(lambda: case.prepare(case.url, "gs://no-such-bucket/out"))
    assert line.startswith("cannot write gs://no-such-bucket/out/parts/options.json: no such file or bucket")
    assert bucket().find(bucket_url) == before and not list(tmp_path.iterdir())


def test_twins_are_made_here(bucket_url: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for url, words in (
        (f"{bucket_url}/twin", "is in a bucket: make the twin in a folder"),
        ("s3://a/b", "another kind than gs://"),
    ):
        line = refusal(capsys, synthetic_co3d.main, "--out", url, "--size", "tiny")
        assert line.startswith(f"--out {url} ") and words in line
    assert not list(tmp_path.iterdir())
