"""python -m niso.main --config=configs/pose_encode.py:quick"""

import os
import sys

import jax
from absl import app, flags, logging

from niso import config, train
from niso.errors import UserError

_CONFIG = config.define_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, logs, figures. Default: runs/<experiment>-<variant>."
)
_ACCEPT = flags.DEFINE_bool("accept_config_changes", False, "Resume a run although its config has changed.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where the processes of a run meet.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "Number of processes of this run, over all machines.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "Which of them this is, from 0.", lower_bound=0)


def main(argv: list[str] | None = None) -> int:
    """Trains the experiment that the flags name; returns the exit code (0 done, 2 a user's mistake, 42 preempted)."""
    logging.set_verbosity(logging.FATAL)  # whatever stops a run is raised; the libraries would log it too, with tracebacks
    if "help" not in flags.FLAGS:
        app.define_help_flags()
    try:
        rest = config.parse(sys.argv if argv is None else argv)
        if rest[1:] or not flags.FLAGS["config"].present:
            extra = f"unknown argument {rest[1]!r}; " if rest[1:] else ""
            raise UserError(f"{extra}usage: python -m niso.main --config=configs/pose_encode.py:quick [--workdir=DIR]")
        experiment = config.Experiment.from_config(_CONFIG.value)
        workdir = _WORKDIR.value or f"runs/{experiment.experiment}-{experiment.variant}"
        if _PROCESSES.value > 1:
            _join(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value)
        return train.run(experiment, workdir, accept_changes=_ACCEPT.value)
    except UserError as error:
        print(f"niso: {error}", file=sys.stderr)
        return 2


def _join(coordinator: str | None, processes: int, process_id: int) -> None:
    """Meets the other processes of the run; before anything that asks jax for its devices."""
    if not coordinator or process_id >= processes:
        raise UserError(f"--processes={processes} needs --coordinator=HOST:PORT and a --process_id from 0 to {processes - 1}")
    # gloo announces every connection on file descriptor 1: what this program prints goes on to the real one.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    jax.distributed.initialize(
        coordinator, processes, process_id,
        initialization_timeout=60, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
