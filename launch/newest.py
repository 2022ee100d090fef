"""python -m launch.newest gs://BUCKET/RUN: prints the step of the newest whole checkpoint of a run, -1 where there is none."""

import sys

from niso import folders
from niso.errors import UserError


def step(workdir: str) -> int:
    """That step; in a bucket a checkpoint is whole once it has an object that says so.

    Raises:
      UserError: what `folders.named` says.
    """
    folder = folders.named(workdir, "workdir") / "checkpoints"
    if folders.kind(folder) != "folder":
        return -1
    steps = [name for name, is_folder in folders.entries(folder) if is_folder and name.isdigit()]
    whole = (int(name) for name in steps if not folders.remote(folder) or (folder / name / "commit_success.txt").exists())
    return max(whole, default=-1)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0, or 2 after a line on what is wrong."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if len(arguments) != 1:
            raise UserError("usage: python -m launch.newest WORKDIR")
        print(step(arguments[0]))
    except folders.failures(UserError) as error:
        print(f"launch.newest: {folders.reason(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
