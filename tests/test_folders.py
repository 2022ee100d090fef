"""Buckets by their URL: refused in one line before anything is made, wherever a folder can be named."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from configs import hmnist_pred
from data_prep import co3d, homnist, images, mnist, shapes
from niso import folders, train
from niso.config import Experiment
from niso.data.pipeline import open_dataset
from niso.errors import UserError

URL = "gs://bucket/folder"


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
        ("--root", lambda: images.prepare(URL, "records")),
        ("--out", lambda: images.prepare("pictures", URL)),
        ("--out", lambda: co3d.prepare("co3d", URL)),
        ("--out", lambda: mnist.prepare("mnist", URL)),
        ("--out", lambda: shapes.prepare("meshes", URL)),
    ],
)
def test_urls_are_refused(what: str, call: Callable[[], Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value) == f"{what} {URL} is a URL: mount the bucket (README, On a pod) and give the mounted folder"
    assert not list(tmp_path.iterdir())


def test_of_homnist_too(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(homnist.Regenerated, "open", lambda *_: None)  # the digits, which are read first
    with pytest.raises(UserError, match="--out gs://bucket/folder is a URL"):
        homnist.prepare(URL, mnist=tmp_path)


def test_other_folders_are_taken_as_they_are() -> None:
    assert folders.named("~/runs", "workdir") == pathlib.Path.home() / "runs"
    assert folders.named("a:/b", "workdir") == pathlib.Path("a:/b")


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
