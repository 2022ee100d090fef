"""URLs that are of no bucket: refused in one line before anything is made, wherever a folder can be named."""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import pytest

from configs import hmnist_pred
from data_prep import co3d, homnist, images, mnist, shapes
from niso import folders, predict, report, train, trajectories
from niso.config import Experiment
from niso.data.pipeline import open_dataset
from niso.errors import UserError
from tests.toy_records import message

URL = "s3://bucket/folder"
# What is called with one folder and is refused for it, and the flag that names it.
PREPARATIONS: list[tuple[str, Callable[[str], Any]]] = [
    ("--root", lambda url: co3d.prepare(url, "records")),
    ("--out", lambda url: co3d.prepare("co3d", url)),
    ("--splits", lambda url: co3d.prepare("co3d", "records", splits=url)),
    ("--root", lambda url: images.prepare(url, "records")),
    ("--out", lambda url: images.prepare("pictures", url)),
    ("--root", lambda url: mnist.prepare(url, "records")),
    ("--out", lambda url: mnist.prepare("mnist", url)),
    ("--root", lambda url: shapes.prepare(url, "records")),
    ("--out", lambda url: shapes.prepare("meshes", url)),
    ("--mat", lambda url: homnist.prepare("records", mat=url)),
    ("--mnist", lambda url: homnist.prepare("records", mnist=url)),
    ("--out", lambda url: homnist.prepare(url, mnist="mnist")),
]


def experiment(**changes: str) -> Experiment:
    config = hmnist_pred.get_config("quick")
    config.data.update(changes, test_copies=1)
    return Experiment.from_config(config)


def dataset(**changes: str) -> Any:
    return open_dataset(experiment(**changes).data)


@pytest.mark.parametrize(
    "what,call",
    [
        ("workdir", lambda: train.run(experiment(), URL)),
        ("config.data.records", lambda: dataset(twin="", records=URL)),
        ("config.data.test_records", lambda: dataset(twin="tiny", test_records=URL)),
    ],
)
def test_urls_are_refused(what: str, call: Callable[[], Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert message(call) == f"{what} {URL} is a URL of another kind than gs://: mount it, and give the mounted folder"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what,prepare", PREPARATIONS)
def test_of_preparations_too(
    what: str, prepare: Callable[[str], Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And buckets, where what reads them is not installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for url, words in (
        (URL, "is a URL of another kind than gs://: mount it, and give the mounted folder"),
        ("http://host/folder", "is a URL of another kind than gs://: mount it, and give the mounted folder"),
        ("gs://", "names no bucket: write gs://BUCKET/FOLDER"),
        ("gs://bucket/folder", f"is in a bucket, and the packages for these are not installed: {folders.INSTALL}"),
    ):
        assert message(lambda url=url: prepare(url)) == f"{what} {url} {words}"
    assert not list(tmp_path.iterdir())


def test_other_folders_are_taken_as_they_are() -> None:
    assert folders.named("~/runs", "workdir") == pathlib.Path.home() / "runs"
    assert folders.named("a:/b", "workdir") == pathlib.Path("a:/b")
    told = message(lambda: folders.named("~nosuchuser/runs", "workdir"))
    assert told == "workdir ~nosuchuser/runs is in the home of a user that there is not: write the folder in full"


@pytest.mark.parametrize(
    "what,main,others",
    [
        ("--frames", predict.main, ["--run=run", "--out=out"]),
        ("--out", predict.main, ["--run=run", "--frames=video.mp4"]),
        ("--out", report.main, ["run"]),
        ("--json", trajectories.main, ["poses.npz"]),
    ],
)
def test_what_is_written_here_alone_has_no_url(
    what: str, main: Callable[[list[str]], int], others: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([*others, f"{what}=gs://bucket/it"]) == 2
    assert f": {what} gs://bucket/it is a URL: give a path of this machine, and copy" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_all_of_a_run_is_in_one_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its name begins with ~, which no shell expands behind --workdir=."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    asked: list[str] = []

    def stop(workdir: str, *_: Any, **__: Any) -> None:
        asked.append(workdir)
        raise UserError("enough")

    monkeypatch.setattr(train, "Checkpoints", stop)
    with pytest.raises(UserError, match="enough"):
        train.run(experiment(), "~/run")
    assert asked == [str(tmp_path / "home/run")]
