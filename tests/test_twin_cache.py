"""The built-in twins: made once, whole or not at all, and of use as they are."""

import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

from niso.data import datasets, pipeline, records, synthetic
from tests.toy_records import SKIPS, by_hand, data, message

PREPARATION = """
import pathlib, sys, time, types
def generate(folder, size, **options):
    pathlib.Path(folder, "half").touch()
    time.sleep(float(sys.argv[1]))
    pathlib.Path(folder, "whole").write_text(size)
def prepare(root, out, **options):
    assert pathlib.Path(root, "whole").is_file()
    pathlib.Path(out, "manifest.json").touch()
for name, entry in (("synthetic_co3d", generate), ("co3d", prepare)):
    module = sys.modules[f"data_prep.{name}"] = types.ModuleType(name)
    setattr(module, entry.__name__, entry)
    module.VERSION, module.PREPARATION = 7, {"tiny": {}, "small": {}}
from niso.data import synthetic
print(synthetic.ensure_twin(types.SimpleNamespace(dataset="co3d", twin="small", size=32)))
"""


def start_twin(cache: pathlib.Path, seconds: float) -> subprocess.Popen:
    """Another process that makes the twin, taking that long to generate it."""
    command = [sys.executable, "-c", PREPARATION, str(seconds)]
    here = pathlib.Path(__file__).parents[1]
    env = os.environ | {"NISO_CACHE": str(cache)}
    return subprocess.Popen(command, cwd=here, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_make_one_twin(tmp_path):
    processes = [start_twin(tmp_path, 0.5) for _ in range(2)]
    ends = [process.communicate(timeout=60) for process in processes]
    assert [out.strip() for out, _ in ends] == [str(tmp_path / f"co3d-small-v7-32px-v{records.FORMAT}")] * 2, ends
    assert sum(err.count("making") for _, err in ends) == 2, ends  # the source and the records, each by one of them


def test_a_killed_twin_is_made_again(tmp_path):
    killed = start_twin(tmp_path, 60)
    end = time.monotonic() + 30
    while not list(tmp_path.glob(".*/half")) and time.monotonic() < end:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not [path for path in tmp_path.glob("[!.]*")]
    out, err = start_twin(tmp_path, 0).communicate(timeout=60)
    assert (pathlib.Path(out.strip()) / "manifest.json").is_file(), err
    assert not list(tmp_path.glob("*.unfinished"))


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("NISO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert synthetic.cache_folder() == pathlib.Path("/home/x/.cache/niso")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert synthetic.cache_folder() == pathlib.Path("/xdg/niso")
    (tmp_path / "file").touch()
    monkeypatch.setenv("NISO_CACHE", str(tmp_path / "file" / "below"))
    asked = types.SimpleNamespace(dataset="co3d", twin="tiny", size=32)
    assert "set NISO_CACHE" in message(lambda: synthetic.ensure_twin(asked))


def test_the_tiny_twin_streams(monkeypatch, tmp_path):
    monkeypatch.setenv("NISO_CACHE", str(tmp_path))
    tiny = data("", twin="tiny", size=32)
    dataset = pipeline.open_dataset(tiny)
    train_lengths, test_lengths = (
        [sequence.length for sequence in records.read_index(synthetic.ensure_twin(tiny), split)] for split in ("train", "test")
    )
    assert (len(train_lengths), len(test_lengths)) == (4, 2) and min(train_lengths + test_lengths) >= 12
    assert dataset.train_size == len(by_hand(train_lengths, range(4)))
    assert dataset.test_size == len(by_hand(test_lengths, SKIPS))
    with dataset.train_batches(batch=4, seed=0, start=0, steps=2, rows=slice(None)) as batches:
        assert [batch["frames_BxTxHxWxC"].shape for batch in batches] == [(4, 2, 32, 32, 3)] * 2
    begin = time.monotonic()
    assert pipeline.open_dataset(tiny).test_size == dataset.test_size
    assert time.monotonic() - begin < 0.5


def test_every_dataset_has_a_twin_and_a_command():
    for name, row in datasets.DATASETS.items():
        assert datasets.find(name) is row and row.schema and row.splits[0] == "train"
        for module in (f"data_prep.{name}", f"data_prep.synthetic_{name}"):
            assert importlib.util.find_spec(module) is not None
