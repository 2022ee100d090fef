"""The paper's tables with your numbers beside the published ones: python -m niso.report RUN [RUN ...] [--out FOLDER]

A RUN is the folder of a run; its resolved config says which line it fills. Runs of one line that differ in their seeds alone
are put together: mean ± standard error over all seeds. Runs that differ in anything else have lines of their own. The encoder that
a head was trained on is looked up, too: its steps and device hours count.

--out also writes report.md, and table_1.csv to table_4.csv with unrounded numbers, one line for each of them.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from niso import folders
from niso.errors import UserError
from niso.published import PARTS, TABLES, Part
from niso.rows import NOTHING, Entry, Line, lines, read

INTRODUCTION = """# The paper's tables

Ours: last evaluation, mean ± standard error over seeds (one seed has none). Device hours: of all seeds and their encoders.
Published: Mitchel, Taylor, Sitzmann, Neural Isometries, NeurIPS 2024; five seeds. Only settings that begin with `paper`, on the
published data, can be the same experiment: others are smaller, and a twin is other data."""


def markdown(entries: Sequence[Entry], notes: Iterable[str]) -> str:
    """The four tables, to be read on a terminal, too."""
    blocks = [INTRODUCTION]
    for part in PARTS:
        wide = len(part.columns) > 1
        heading = f"## Table {part.table}. {part.dataset}: {part.quantity}{' (ours / published)' if wide else ''}"
        names = ["row", "setting", "seeds", "steps", "device hours", *(part.columns if wide else ["ours", "published"])]
        blocks.append(f"{heading}\n\n{_aligned([names, *(_cells(line, part) for line in lines(entries, part))])}")
    return "\n\n".join([*blocks, "\n".join(f"- {note}" for note in notes)]).rstrip() + "\n"


def _cells(line: Line, part: Part) -> list[str]:
    ours = [_figure(mean, error, part.digits) for mean, error in line.figures]
    published = part.rows.get(line.label, (NOTHING,) * len(ours))
    figures = [f"{a} / {b}" for a, b in zip(ours, published, strict=True)] if len(ours) > 1 else [ours[0], published[0]]
    hours = NOTHING if line.hours is None else f"{line.hours:.3g}"
    return [line.label, line.setting, str(line.seeds or NOTHING), line.steps, hours, *figures]


def _figure(mean: float | None, error: float | None, digits: int) -> str:
    if mean is None:
        return NOTHING
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns are one below the other."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (padded[0], ["-" * width for width in widths], *padded[1:]))


def as_csv(entries: Sequence[Entry], table: int) -> str:
    """One table with unrounded numbers, one of them a line; empty where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "row", "setting", "quantity", "column", "ours", "standard_error", "seeds", "steps", "device_hours",
                     "published", "published_standard_error", "runs"])  # fmt: skip
    for part in (part for part in PARTS if part.table == table):
        for line in lines(entries, part):
            published = part.rows.get(line.label, ("",) * len(part.columns))
            for column, (mean, error), paper in zip(part.columns, line.figures, published, strict=True):
                value, _, their_error = paper.partition(" ± ")
                writer.writerow([part.dataset, line.label, line.setting, part.quantity, column, mean, error, line.seeds, line.steps,
                                 line.hours, value, their_error, " ".join(line.runs)])  # fmt: skip
    return text.getvalue()


def _write(folder: Path, texts: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}; choose another folder with --out") from None


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 after a message to the user."""
    parser = argparse.ArgumentParser(prog="python -m niso.report", description="The paper's tables, with the numbers of runs.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the folder of a run")
    parser.add_argument("--out", metavar="FOLDER", help="write report.md and table_1.csv to table_4.csv there, too")
    options = parser.parse_args(argv)
    try:
        out = None if options.out is None else folders.here(options.out, "--out")
        entries, notes = read(options.runs)
        text = markdown(entries, notes)
        if out is not None:
            tables = {f"table_{table}.csv": as_csv(entries, table) for table in TABLES}
            _write(out, {"report.md": text} | tables)
    except UserError as error:
        print(f"niso.report: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
