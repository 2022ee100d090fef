"""python -m niso.main --config=configs/pose_encode.py:quick"""

import sys

from absl import flags, logging

from niso import config, train
from niso.errors import UserError

_CONFIG = config.define_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, logs, figures. Default: runs/<experiment>-<variant>."
)
_ACCEPT = flags.DEFINE_bool("accept_config_changes", False, "Resume a run although its config has changed.")


def main(argv: list[str] | None = None) -> int:
    """Trains the experiment that the flags name; returns the exit code (0 done, 2 a user's mistake, 42 preempted)."""
    logging.set_verbosity(logging.WARNING)
    try:
        rest = config.parse(sys.argv if argv is None else argv)
        if rest[1:] or not flags.FLAGS["config"].present:
            extra = f"unknown argument {rest[1]!r}; " if rest[1:] else ""
            raise UserError(f"{extra}usage: python -m niso.main --config=configs/pose_encode.py:quick [--workdir=DIR]")
        experiment = config.Experiment.from_config(_CONFIG.value)
        workdir = _WORKDIR.value or f"runs/{experiment.experiment}-{experiment.variant}"
        return train.run(experiment, workdir, accept_changes=_ACCEPT.value)
    except UserError as error:
        print(f"niso: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
