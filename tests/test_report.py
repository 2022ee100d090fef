"""The report: which line a run fills, what is put together, the files, and a clear line for every mistake."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from configs import cshrec11_encode, cshrec11_pred, hmnist_encode, hmnist_pred, pose_encode, pose_pred, toric_laplacian
from niso import event_writer, report, run_files
from niso.errors import UserError
from niso.published import PARTS, SKIPS, TABLES
from niso.rows import Line, lines, read
from niso.telemetry import Telemetry

MODULES = (cshrec11_encode, cshrec11_pred, hmnist_encode, hmnist_pred, pose_encode, pose_pred)
CONFIGS = {module.__name__.partition(".")[2]: module for module in MODULES}
# Numbers of the reduced configs may change: these are the tests' own.
OWN = {
    "hmnist_encode": {"steps": 1_400, "data.test_examples": 1_000},
    "hmnist_pred": {"steps": 6_000, "data.test_examples": 2_000, "data.test_copies": 1},
}
CLASSES, SHAPES, POSES, ERRORS, SHAPE_ERRORS, POSE_ERRORS = PARTS


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(
    path: str, experiment: str, variant: str, values: dict[str, float] | list[dict[str, float]], *,
    kind: str = "eval", hours: float | None = None, step: int | None = None, **changes: Any,
) -> str:  # fmt: skip
    """A run's folder: its config with `changes` (keys with __ for the dot), an early evaluation, and one with these values."""
    config = CONFIGS[experiment].get_config(variant)
    config.update_from_flattened_dict(OWN.get(experiment, {}))
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return write(path, config.to_dict(), values, kind, hours, step)


def write(
    path: str, config: dict[str, Any], values: dict[str, float] | list[dict[str, float]], kind: str = "eval",
    hours: float | None = None, step: int | None = None,
) -> str:  # fmt: skip
    folder = Path(path)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    step = config["steps"] if step is None else step
    found = values if isinstance(values, list) else [values]
    line: dict[str, Any] = {"step": step}
    line |= {f"{kind}/{name}": sum(of_one[name] for of_one in found) / len(found) for name in found[0]}
    if len(found) > 1:
        for seed, of_one in enumerate(found, config["seed"]):
            line |= {f"{kind}_seed_{seed}/{name}": value for name, value in of_one.items()}
    written = [{"step": 0, **{name: 1e9 for name in line if name != "step"}}, {"step": step, "train/loss": 1.0}, line]
    if kind != "eval":
        written.insert(0, {"step": step, "eval/loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in written))
    if hours is not None:
        (folder / "hours.jsonl").write_text(
            "".join(json.dumps({"step": at, "time/device_hours": value}) + "\n" for at, value in ((1, hours / 2), (step, hours)))
        )
    return path


def only(paths: list[str], part: Any) -> list[Line]:
    """The lines that runs have filled."""
    return [line for line in lines(read(paths)[0], part) if line.seeds]


def classified(arm: str, accuracy: float, seed: int = 0, **changes: Any) -> str:
    """A classifier's run, and its encoder's where the config has it."""
    name = f"{arm}-{seed}"
    make(f"runs/e-{name}", "hmnist_encode", f"small-{arm}", {"equivariance_error": 5.0}, hours=0.5, seed=seed)
    source = ((".*encoder.*", f"runs/e-{name}"),)
    values = {"accuracy": accuracy}
    return make(f"runs/p-{name}", "hmnist_pred", f"small-{arm}", values, hours=0.25, seed=seed, task__warm_start=source, **changes)


def fails(*arguments: str) -> str:
    """What the command says on stderr; it leaves with 2, and says nothing else."""
    ended = subprocess.run([sys.executable, "-m", "niso.report", *arguments], capture_output=True, text=True, env=environment())
    assert (ended.returncode, ended.stdout) == (2, "") and ended.stderr.count("\n") == 1, ended
    assert ended.stderr.startswith("niso.report: ")
    return ended.stderr


def environment() -> dict[str, str]:
    return {"PYTHONPATH": str(Path(__file__).parents[1])}


def test_the_published_tables_are_whole() -> None:
    assert {part.table for part in PARTS} == set(TABLES)
    for part in PARTS:
        assert {len(figures) for figures in part.rows.values()} == {len(part.columns)} == {len(part.metrics)}
        assert set(part.names.values()) <= set(part.rows) | {"without Ω"}
        for figure in (figure for figures in part.rows.values() for figure in figures):
            assert [float(number) >= 0 for number in figure.split(" ± ")]
    assert run_files.METRICS_FILE == event_writer.METRICS_FILE


def test_without_a_run_that_fills_a_row_it_says_so() -> None:
    text = report.markdown([], [])
    assert "| NIso (triplets)            | not run | -     | -     | -            | -    | 97.38 ± 0.23 |" in text
    assert text.count("not run") == sum(len(part.rows) for part in PARTS)


def test_seeds_of_one_experiment_are_put_together() -> None:
    paths = [classified("pairs", accuracy, seed) for seed, accuracy in enumerate((90.0, 92.0, 97.0))]
    (line,) = only(paths, CLASSES)
    assert line.label == "NIso (pairs)" and line.setting == "small-pairs, mnist, 2,000 test examples, L_E relative"
    assert (line.seeds, line.steps, line.hours) == (3, "1,400 + 6,000", 3 * 0.75)
    # Deviations −3, −1, 4: sample variance 26 / 2, over three seeds.
    assert line.figures == ((pytest.approx(93.0), pytest.approx((13 / 3) ** 0.5)),)
    row = next(row for row in report.markdown(*read(paths)).splitlines() if "small-pairs" in row)
    assert [cell.strip() for cell in row.split("|")[3:-1]] == ["3", "1,400 + 6,000", "2.25", "93.00 ± 2.08", "92.52 ± 0.91"]


def test_two_names_of_one_variant_are_one_experiment() -> None:
    names, error = ("small", "small-triplets"), {"equivariance_error": 4.0}
    paths = [make(f"runs/{name}", "hmnist_encode", name, error, seed=seed) for seed, name in enumerate(names)]
    (line,) = only(paths, ERRORS)
    assert (line.label, line.seeds) == ("NIso (triplets)", 2)


def test_replicas_count_as_seeds_and_an_encoder_once() -> None:
    make("runs/e", "hmnist_encode", "small", [{"equivariance_error": 5.0}, {"equivariance_error": 6.0}], seeds=2, hours=1.0)
    source = (("(encoder|operator)/.*", "runs/e"),)
    options = {"hours": 0.5, "task__warm_start": source}
    both = make("runs/p", "hmnist_pred", "small", [{"accuracy": 80.0}, {"accuracy": 84.0}], seeds=2, seed=3, **options)
    third = make("runs/q", "hmnist_pred", "small", {"accuracy": 88.0}, seed=5, **options)
    (line,) = only([both, third], CLASSES)
    assert (line.label, line.seeds, line.hours) == ("NIso (triplets)", 3, 2.0)
    assert line.figures == ((pytest.approx(84.0), pytest.approx(4 / 3**0.5)),)
    (line,) = only(["runs/e"], ERRORS)
    assert (line.label, line.seeds, line.steps, line.hours) == ("NIso (triplets)", 2, "1,400", 1.0)
    assert line.figures == ((5.5, pytest.approx(0.5)),)


def test_one_seed_has_no_error_and_old_runs_have_no_hours() -> None:
    path = make("runs/e", "hmnist_encode", "small-pairs", {"equivariance_error": 5.25})
    (line,) = only([path], ERRORS)
    assert line.figures == ((5.25, None),) and line.hours is None
    row = next(row for row in report.markdown(*read([path])).splitlines() if "small-pairs" in row)
    assert [cell.strip() for cell in row.split("|")[-4:-1]] == ["-", "5.25", "4.06"]


@pytest.mark.parametrize(
    ("arm", "changes", "label"),
    [
        ("pairs", {}, "NIso (pairs)"),
        ("triplets", {}, "NIso (triplets)"),
        ("without_equivariance", {}, "without L_E"),
        ("without_multiplicity", {}, "without L_M"),
        ("autoencoder", {}, "autoencoder + augmentation"),
        ("autoencoder", {"task__augment": False}, "autoencoder, no augmentation"),
        ("triplets", {"task__augment": True}, "NIso (triplets), with augmentation"),
        ("triplets", {"task__head": "mlp"}, "NIso (triplets), ordinary head"),
        ("triplets", {"task__warped": False}, "NIso (triplets), tested on unperturbed images"),
    ],
)
def test_the_row_of_a_classifier(arm: str, changes: dict[str, Any], label: str) -> None:
    (line,) = only([classified(arm, 50.0, **changes)], CLASSES)
    assert line.label == label


def test_the_row_is_read_from_the_encoder_whatever_anything_is_called() -> None:
    changes = {"task__alpha": 0.0, "task__regime": "triplets"}
    make("elsewhere/runs/pairs", "hmnist_encode", "small", {"equivariance_error": 1.0}, hours=1.0, step=200, **changes)
    options: dict[str, Any] = {"hours": 0.5, "task__warm_start": (("operator/.*", "x"), ("encoder/.*", "runs/pairs"))}
    path = make("elsewhere/runs/p", "hmnist_pred", "small-pairs", {"accuracy": 9.0}, task__trainable=".*", **options)
    (line,) = only([path], CLASSES)  # its encoder is beside it, not below this folder
    assert (line.label, line.steps, line.hours) == ("NIso (triplets), without L_E", "step 200 of 1400 + 6,000", 1.5)
    assert line.setting == "small-pairs, mnist, 2,000 test examples, trains .*"
    make("runs/pairs", "hmnist_encode", "small-pairs", {"equivariance_error": 1.0})
    entries, notes = read([path])
    assert [entry.label for entry in entries] == ["NIso (pairs)"]
    assert notes == [f"{path}: its encoder was taken to be runs/pairs; there is also {Path.cwd() / 'elsewhere/runs/pairs'}"]


def test_an_encoder_that_is_not_there() -> None:
    source = (("(encoder|operator)/.*", "runs/gone"),)
    path = make("runs/p", "hmnist_pred", "quick", {"accuracy": 9.0}, hours=1.0, task__warm_start=source)
    (line,) = only([path], CLASSES)
    assert (line.label, line.steps, line.hours) == ("encoder unknown (runs/gone not found)", "? + 6,000", None)
    ate = {"stride_1/ate_ref": 0.5}
    path = make("runs/q", "pose_pred", "quick", ate, kind="trajectories", hours=1.0, task__warm_start=source)
    (line,) = only([path], POSES)
    assert (line.label, line.steps, line.hours) == ("NIso", "? + 300", None)
    assert read([path])[1] == ["runs/q: its encoder runs/gone was not found; its steps and device hours are not counted"]
    path = make("runs/r", "pose_pred", "quick", ate, kind="trajectories", task__warm_start=())
    assert only([path], POSES)[0].label == "NIso (pairs), no trained encoder"


def test_device_hours_go_on_over_resumes() -> None:
    path = make("runs/e", "hmnist_encode", "small", {"equivariance_error": 5.0})
    now = [0.0]

    def train(resume_step: int, last: int, save: int) -> None:
        with Telemetry(path, steps=1_400, batch=1, resume_step=resume_step, clock=lambda: now[0]) as run:
            for step in range(resume_step + 1, last + 1):
                now[0] += 3600.0
                run.tick(step)
                if step == save:
                    run.flush()
                if step % 2 == 0:
                    run.progress(step, {})

    def hours() -> float | None:
        found = run_files.read(path).hours
        return None if found is None else found / jax.device_count()

    train(0, last=5, save=3)  # the hours of step 5 were not written, and go with it
    assert hours() == 4.0
    now[0] += 1e9  # waiting for a machine
    train(3, last=6, save=6)
    assert hours() == 6.0
    train(0, last=2, save=2)
    assert hours() == 2.0
    Path(path, "hours.jsonl").unlink()  # as a run whose first steps did not count
    train(2, last=4, save=4)
    assert hours() is None and Path(path, "hours.jsonl").read_bytes() == b""


def test_what_differs_stands_apart_and_says_in_what() -> None:
    paths = [make(f"runs/{batch}", "hmnist_encode", "small", {"equivariance_error": 1.0}, batch=batch) for batch in (16, 32)]
    paths.append(make("runs/long", "hmnist_encode", "small", {"equivariance_error": 2.0}, steps=2_000))
    paths.append(make("runs/half", "hmnist_encode", "small", {"equivariance_error": 2.0}, step=1_500, steps=2_000))
    found = only(paths, ERRORS)
    assert [line.setting.removeprefix("small, mnist, 1,000 test examples, ") for line in found] == [
        "batch=16", "batch=32", "batch=16", "batch=16",
    ]  # fmt: skip
    assert [line.steps for line in found] == ["1,400", "1,400", "2,000", "step 1500 of 2000"]
    # How a run was computed and written down is no difference, nor are heads of encoders that differ in the seed alone.
    options = {"log__every": 7, "checkpoint__keep": 9, "mesh__space": 2, "data__threads": 9, "seed": 1}
    paths = [paths[0], make("runs/other", "hmnist_encode", "small", {"equivariance_error": 3.0}, **options)]
    (line,) = only(paths, ERRORS)
    assert line.seeds == 2 and line.figures[0][0] == 2.0
    # Heads of different encoders are different experiments.
    two = [
        make(f"runs/head-{n}", "hmnist_pred", "small", {"accuracy": 1.0}, seed=n, task__warm_start=(("encoder/.*", run),))
        for n, run in enumerate(("runs/16", "runs/32"))
    ]
    assert [line.setting.partition("examples, ")[2] for line in only(two, CLASSES)] == ["encoder.batch=16", "encoder.batch=32"]


def test_poses_by_stride() -> None:
    make("runs/e", "pose_encode", "small", {f"equivariance_error_skip_{skip}": 5.0 + skip for skip in SKIPS}, hours=0.5)
    ate = {f"stride_{skip + 1}/ate_ref": 0.01 * (skip + 1) for skip in SKIPS}
    options: dict[str, Any] = {"kind": "trajectories", "hours": 0.25, "task__warm_start": (("(encoder|operator)/.*", "runs/e"),)}
    path = make("runs/p", "pose_pred", "small", ate, **options)
    published = make("runs/p-scale", "pose_pred", "small", ate, task__scale="published", **options)
    text = report.markdown(*read([path, "runs/e"]))
    assert (
        "| NIso      | small, twin small, scale positive | 1     | 2,000 + 3,000 | 0.75         | 0.0100 / .023 | 0.0200 / .031 |"
        in text
    )
    assert "| NIso | small, twin small | 1     | 2,000 | 0.5          | 5.00 / 5.25 | 6.00 / 5.84 |" in text
    first, second = only([path, published], POSES)
    assert "scale published" in second.setting and "scale positive" in first.setting
    make("runs/f", "pose_encode", "small", {"equivariance_error_skip_0": 9.0}, task__operator=False)
    options |= {"task__operator": False, "task__warm_start": ((".*", "runs/f"),)}
    without = make("runs/q", "pose_pred", "small", {"stride_1/ate_ref": 0.5, "stride_2/ate_ref": 0.6}, **options)
    (line,) = only([without], POSES)
    assert line.label == "without Ω" and line.figures == ((0.5, None), (0.6, None), *[(None, None)] * 4)
    assert only(["runs/f"], POSE_ERRORS)[0].label == "without Ω"


@pytest.mark.parametrize("arm,label", [("pairs", "NIso"), ("autoencoder", "autoencoder + augmentation")])
def test_the_rows_of_conformal_shapes(arm: str, label: str) -> None:
    values = {"equivariance_error": 6.0} if arm == "pairs" else {"loss": 1.0}
    make(f"runs/cshrec11_encode-paper-{arm}", "cshrec11_encode", f"paper-{arm}", values)
    make("runs/p", "cshrec11_pred", f"paper-{arm}", {"accuracy": 88.0})
    (line,) = only(["runs/p"], SHAPES)
    assert (line.label, line.setting, line.steps) == (label, f"paper-{arm}, shapes, trains .*", "50,000 + 10,000")
    assert line.label in SHAPES.rows
    errors = only([f"runs/cshrec11_encode-paper-{arm}"], SHAPE_ERRORS)
    assert [line.label for line in errors] == (["NIso"] if arm == "pairs" else [])


def test_runs_that_belong_nowhere_are_named() -> None:
    toric = toric_laplacian.get_config("quick").to_dict()
    paths = [write(f"runs/{n}", toric, {"loss": 1.0}) for n in "ab"]
    paths.append(make("runs/c", "hmnist_encode", "small-autoencoder", {"loss": 1.0}))
    entries, notes = read(paths)
    assert entries == [] and notes == [
        "toric_laplacian: in none of these tables",
        "runs/c: no equivariance_error in its last evaluation: the regime reconstruction has none; left out",
    ]
    assert report.markdown(entries, notes).endswith("- toric_laplacian: in none of these tables\n- " + notes[1] + "\n")


def test_the_command_writes_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    paths = [classified("triplets", accuracy, seed) for seed, accuracy in enumerate((96.0, 97.5))]
    assert report.main([*paths, "--out", "new/folder"]) == 0
    assert Path("new/folder/report.md").read_text() == capsys.readouterr().out
    assert {path.name for path in Path("new/folder").iterdir()} == {"report.md", *(f"table_{n}.csv" for n in TABLES)}
    rows = {n: list(csv.DictReader(Path(f"new/folder/table_{n}.csv").read_text().splitlines())) for n in TABLES}
    assert [len(rows[n]) for n in TABLES] == [9, 4, 36, 2 + 2 + 6]
    row = rows[1][1]
    assert (row["row"], row["column"], row["seeds"], row["steps"]) == ("NIso (triplets)", "accuracy", "2", "1,400 + 6,000")
    assert (float(row["ours"]), float(row["standard_error"]), float(row["device_hours"])) == (96.75, pytest.approx(0.75), 1.5)
    assert (row["published"], row["published_standard_error"], row["runs"]) == ("97.38", "0.23", " ".join(paths))
    assert rows[1][0]["setting"] == "not run" and rows[1][0]["ours"] == ""
    assert rows[3][5]["column"] == "skip 9" and rows[3][5]["published"] == ".081"


def test_it_needs_no_jax() -> None:
    program = "import sys, niso.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=environment()).returncode == 0


def test_a_run_that_is_writing_is_read() -> None:
    path = make("runs/e", "hmnist_encode", "small", {"equivariance_error": 5.0})
    with open(f"{path}/metrics.jsonl", "a") as file:
        file.write('{"step": 1400, "eval/equiv')
    assert only([path], ERRORS)[0].figures == ((5.0, None),)


def test_numbers_that_are_not_finite() -> None:
    path = make("runs/e", "hmnist_encode", "small", {"equivariance_error": 5.0})
    metrics = Path(path, "metrics.jsonl")
    metrics.write_text('{"step": 1400, "eval/equivariance_error": "nan"}\n')
    assert "| nan " in report.markdown(*read([path]))
    metrics.write_text('{"step": 1400, "eval/equivariance_error": [1]}\n')
    with pytest.raises(UserError, match=r"runs/e: eval/equivariance_error in metrics\.jsonl is not a number"):
        read([path])


def test_a_seed_that_lacks_a_number_leaves_it_out() -> None:
    path = make(
        "runs/e", "pose_encode", "small", [{"equivariance_error_skip_0": 1.0, "equivariance_error_skip_1": 2.0}] * 2, seeds=2
    )
    metrics = Path(path, "metrics.jsonl")
    metrics.write_text(metrics.read_text().replace('"eval_seed_1/equivariance_error_skip_1"', '"other"'))
    assert only([path], POSE_ERRORS)[0].figures[:2] == ((1.0, 0.0), (None, None))


def test_the_same_seed_twice() -> None:
    one = make("runs/a", "hmnist_encode", "small", [{"equivariance_error": 1.0}] * 3, seeds=3)
    two = make("runs/b", "hmnist_encode", "small", {"equivariance_error": 1.0}, seed=2)
    told = fails(one, two)
    assert "runs/a and runs/b are both seed 2 of NIso (triplets) (small, mnist, 1,000 test examples): give one of them" in told


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (("config.json", None), "runs/e has no config.json: it is not the folder of a run"),
        (("config.json", '{\n"a": }'), "runs/e/config.json, line 2: unreadable JSON"),
        (("config.json", '{"experiment": "hmnist_encode"}'), "it lacks variant, seed, steps, task, data"),
        (("config.json", "[]"), "it lacks experiment"),
        (("metrics.jsonl", None), "runs/e has no evaluation in metrics.jsonl yet"),
        (("metrics.jsonl", '{"step": 1, "train/loss": 1.0}\n'), "runs/e has no evaluation in metrics.jsonl yet"),
        (("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 2}\n'), "runs/e/metrics.jsonl, line 2: unreadable JSON"),
        (("metrics.jsonl", '{"step": 1}\n\0\0\n'), "runs/e/metrics.jsonl, line 2: unreadable JSON"),
        (("metrics.jsonl", "[]\n"), "runs/e/metrics.jsonl, line 1: unreadable JSON"),
    ],
)
def test_damaged_folders(capsys: pytest.CaptureFixture[str], damage: tuple[str, str | None], told: str) -> None:
    path, (name, text) = make("runs/e", "hmnist_encode", "small", {"equivariance_error": 5.0}), damage
    file = Path(path, name)
    file.write_text(text) if text is not None else file.unlink()
    assert report.main([path]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("niso.report: ") and said.err.count("\n") == 1 and told in said.err


def test_other_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "runs/none is not a folder" in fails("runs/none")
    path = make("runs/p", "pose_pred", "quick", {"loss": 1.0})
    assert report.main([path]) == 2
    assert "runs/p has no evaluation of trajectories in metrics.jsonl yet" in capsys.readouterr().err
    path = make("runs/e", "hmnist_encode", "small", {"equivariance_error": 5.0})
    Path("file").write_text("")
    for out in ("file", "file/below", "/proc/none"):
        assert report.main([path, "--out", out]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith(f"niso.report: cannot write in {out}: ") and said.err.count("\n") == 1
