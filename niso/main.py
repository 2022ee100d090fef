"""python -m niso.main --config=configs/pose_encode.py:quick"""

import sys

from absl import app, flags, logging

from niso import config, distributed, train
from niso.errors import UserError

_CONFIG = config.define_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, logs, figures. Default: runs/<experiment>-<variant>."
)
_ACCEPT = flags.DEFINE_bool("accept_config_changes", False, "Resume a run although its config has changed.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where the processes of a run meet.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes of this run, over all machines.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "auto", ["auto", "off"], "auto: one of several processes where Slurm, Open MPI, Kubernetes or a TPU pod says so."
)


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
        detect = _DISTRIBUTED.value == "auto"
        with distributed.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value, detect):
            return train.run(experiment, workdir, accept_changes=_ACCEPT.value)
    except UserError as error:
        print(f"niso: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
