"""python -m niso.main --config=configs/pose_encode.py:quick"""

import sys
from typing import NoReturn

from absl import app, flags, logging

from niso import config, distributed, dry_run, peers, train
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
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print every array and the cost of the compiled train step instead; needs no data.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "With --dry_run: compile for a TPU slice that is not there, such as v5e:16x16.")


def main(argv: list[str] | None = None) -> int:
    """Trains what the flags name, or says what it would be; returns the exit code.

    0: done, 1: something was lost, so that starting again may help, 2: a user's mistake, 42: preempted.
    """
    logging.set_verbosity(logging.FATAL)  # whatever stops a run is raised; the libraries would log it too, with tracebacks
    if "help" not in flags.FLAGS:
        app.define_help_flags()
    try:
        rest = config.parse(sys.argv if argv is None else argv)
        if rest[1:] or not flags.FLAGS["config"].present:
            extra = f"unknown argument {rest[1]!r}; " if rest[1:] else ""
            raise UserError(f"{extra}usage: python -m niso.main --config=configs/pose_encode.py:quick [--workdir=DIR]")
        experiment = config.Experiment.from_config(_CONFIG.value)
        if _TOPOLOGY.value and not _DRY_RUN.value:
            raise UserError(f"--topology={_TOPOLOGY.value} is for --dry_run: leave it out to train on what is here")
        if _DRY_RUN.value:
            return dry_run.run(experiment, _TOPOLOGY.value)
        workdir = _WORKDIR.value or f"runs/{experiment.experiment}-{experiment.variant}"
        detect = _DISTRIBUTED.value == "auto"
        with distributed.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value, detect) as watch:
            code = train.run(experiment, workdir, accept_changes=_ACCEPT.value, for_good=argv is None)
            if watch:
                watch.exit_code = code
            return code
    except UserError as error:
        print(f"niso: {error}", file=sys.stderr, flush=True)
        return error.code


def program() -> NoReturn:
    """`main`, and then the end of the process: after an error soon, whatever its threads wait for."""
    debugged = sys.flags.interactive or "pdb" in sys.orig_argv  # somebody goes on with it
    code = peers.AGAIN
    try:
        code = main()
    finally:
        if code not in (0, train.PREEMPTED) and not debugged:
            peers.end_late(code)
    sys.exit(code)


if __name__ == "__main__":
    program()
