"""Runs of data_prep.co3d that are broken off, repeated, repaired, or asked for the wrong thing."""

import gzip
import json
import os
import shutil

import pytest

from data_prep import co3d, co3d_shard, co3d_source
from niso.data import records
from niso.errors import UserError
from tests.co3d_tree import EVERYTHING, SIZE, make_tree, read_annotations, write_annotations
from tests.prep_runs import contents, kill_in_the_third_shard


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("co3d"))


@pytest.fixture(scope="module")
def unbroken(tree, tmp_path_factory):
    """What an unbroken run on the tree leaves behind."""
    out = tmp_path_factory.mktemp("out") / "records"
    co3d.prepare(tree, out, **EVERYTHING)
    return contents(out)


_SLOW_RUN = """
import json, sys, time
from data_prep import co3d, co3d_shard
make = co3d_shard.make_example
def slowly(*arguments):
    time.sleep(0.02)
    return make(*arguments)
co3d_shard.make_example = slowly
co3d.prepare(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
"""


def test_a_killed_run_continues_and_ends_with_the_same_bytes(tree, unbroken, tmp_path):
    out = tmp_path / "out"
    done = kill_in_the_third_shard(out, _SLOW_RUN, tree, out, json.dumps(EVERYTHING))
    with pytest.raises(UserError, match="no finished records"):
        records.Reader(out, "train", records.FRAME)
    co3d.prepare(tree, out, **EVERYTHING)
    assert contents(out) == unbroken
    assert all(os.stat(path).st_mtime_ns == before for path, before in done.items()), "finished shards were made again"


def test_several_workers_write_the_same_bytes(tree, unbroken, tmp_path, capsys):
    co3d.prepare(tree, tmp_path / "out", **EVERYTHING | {"workers": 2, "progress": True})
    assert contents(tmp_path / "out") == unbroken
    assert "6/6 shards" in capsys.readouterr().err


def test_a_worker_reports_its_error_and_the_rest_is_ended(tree, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    victim = next(root.glob("apple/*/images/*.jpg"))
    victim.unlink()
    victim.mkdir()
    with pytest.raises(UserError, match=f"cannot read {victim}"):
        co3d.prepare(root, tmp_path / "out", **EVERYTHING | {"workers": 2})


@pytest.mark.parametrize("damage", ["shard", "note", "truncated", "manifest", "index"])
def test_what_is_missing_is_made_again_and_nothing_else(tree, unbroken, tmp_path, damage, monkeypatch):
    out = tmp_path / "out"
    for name, content in unbroken.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    shard = out / "train-00001-of-00003.array_record"
    victim = {
        "shard": shard,
        "truncated": shard,
        "note": out / "parts" / f"{shard.name}.json",
        "manifest": out / "manifest.json",
        "index": out / "index-test.json",
    }[damage]
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-10])
    else:
        victim.unlink()
    built, build = [], co3d_shard.build
    monkeypatch.setattr(co3d_shard, "build", lambda job: built.append(job.file) or build(job))
    co3d.prepare(tree, out, **EVERYTHING)
    assert contents(out) == unbroken
    assert built == ([shard.name] if damage in ("shard", "note", "truncated") else [])


def _main(tree, out, *more):
    return co3d.main(["--root", str(tree), "--out", str(out), "--size", "16", "--workers", "1", *more])


def test_a_finished_folder_says_so_and_refuses_other_options(tree, tmp_path, capsys):
    choice = ["--top_quantile", "0", "--test_fraction", "0.34"]
    assert _main(tree, tmp_path / "out", *choice) == 0
    capsys.readouterr()
    before = contents(tmp_path / "out")
    assert _main(tree, tmp_path / "out", *choice) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'out'}: nothing to do, the records are complete"
    for more, words in (
        (["--size", "24"], "size 16 then, 24 now"),
        (["--shards", "2"], "shards None then, 2 now"),
        (["--test_fraction", "0.5"], "test_fraction 0.34 then, 0.5 now"),
        (["--categories", "apple"], "categories None then, ['apple'] now"),
    ):
        assert _main(tree, tmp_path / "out", *choice, *more) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and "another --out" in error
    assert contents(tmp_path / "out") == before


def test_changed_annotations_are_refused(tree, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    co3d.prepare(root, tmp_path / "out", **EVERYTHING)
    write_annotations(
        root, "apple", list(read_annotations(root, "apple").values())[:-3], co3d_source.read_scores(root, ["apple"])["apple"]
    )
    with pytest.raises(UserError, match=r"other sequences are chosen, or the annotations"):
        co3d.prepare(root, tmp_path / "out", **EVERYTHING)


def test_every_mistake_is_one_line(tree, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    (broken / "a").mkdir(parents=True)
    (broken / "a" / "sequence_annotations.jgz").write_bytes(gzip.compress(b"[1, 2]")[:-4])
    for root, to, more, words in (
        (tmp_path / "none", out, [], "no folder"),
        (tmp_path / "empty", out, [], "root of a CO3Dv2 folder"),
        (broken, out, [], "sequence_annotations.jgz cannot be read"),
        (tree, out, ["--categories", "apple", "pear"], "no category pear; it has apple, bench"),
        (tree, out, [], "--top_quantile"),
        (tree, out, ["--size", "0"], "--size is 0"),
        (tree, out, ["--test_fraction", "1"], "--test_fraction is 1.0"),
        (tree, out, ["--splits", "nowhere.json"], "cannot read nowhere.json"),
        (tree, tmp_path / "file" / "out", ["--top_quantile", "0", "--test_fraction", "0.5"], "cannot make the folder"),
    ):
        assert _main(root, to, *more) == 2, words
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("{", "is no list of splits"),
        ("[]", "is no list of splits"),
        ({"train": {"apple": [1]}}, "names sequences that"),
        ({"train": {"apple": []}}, "at least one name"),
        ({"val": {"apple": ["x"]}}, "found the splits val"),
        ({"train": {"pear": ["x"]}}, "names categories that"),
        ({"train": {"apple": [f"x{n}" for n in range(7)]}}, "apple/x0, apple/x1, apple/x2, apple/x3, apple/x4 and 2"),
    ],
)
def test_a_bad_list_of_splits_is_one_line(tree, tmp_path, capsys, listed, words):
    (tmp_path / "list.json").write_text(listed if isinstance(listed, str) else json.dumps(listed))
    assert _main(tree, tmp_path / "out", "--splits", str(tmp_path / "list.json")) == 2
    error = capsys.readouterr().err
    assert words in error and str(tmp_path / "list.json") in error and error.count("\n") == 1


def test_a_list_is_narrowed_to_the_chosen_categories(tree, tmp_path):
    names = list(co3d_source.read_scores(tree, ["apple"])["apple"])[:2]
    listed = {"train": {"pear": ["x"], "apple": names[::-1]}, "test": {"pear": ["x"]}}
    (tmp_path / "list.json").write_text(json.dumps(listed))
    manifest = co3d.prepare(tree, tmp_path / "out", splits=tmp_path / "list.json", categories=["apple"], size=SIZE, progress=False)
    assert list(manifest.splits) == ["train"]
    assert [s.name for s in records.read_index(tmp_path / "out", "train")] == names[::-1]  # the order of the list
    with pytest.raises(UserError, match="names no sequence of the chosen categories bench"):
        co3d.prepare(tree, tmp_path / "out2", splits=tmp_path / "list.json", categories=["bench"])


def test_a_foreign_folder_and_missing_images_are_refused(tree, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not made by this program"):
        co3d.prepare(tree, tmp_path, **EVERYTHING)
    root = tmp_path / "annotations_only"
    for path in tree.glob("*/*.jgz"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.parent.name)
    with pytest.raises(UserError, match=r"no usable sequence in split train \(.*60 frames with missing image"):
        co3d.prepare(root, tmp_path / "out", **EVERYTHING)
    assert not (tmp_path / "out" / "manifest.json").exists()
