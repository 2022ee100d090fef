#!/usr/bin/env bash
# Runs a command until it is done, starting it again where that helps:
#
#   launch/restart.sh python -m niso.main --config=configs/pose_encode.py --workdir=runs/pose_encode
#
# Exit code 0: done. 42, the machine is being taken away and the run is saved: again, at once. 2, a mistake of the user's: stop.
# Any other, or a signal (1: another process of the run is gone): again after BACKOFF seconds (5; doubled each time, 300 at most),
# but RETRIES times in a row (5) without a new checkpoint in the command's --workdir=... (or below runs/) is the end. SIGTERM, or Ctrl-C, is for
# the command, and ends the loop too: it gets a SIGTERM, or PASS_ON is done instead, where that would not reach the run (srun kills
# its tasks on one: launch/slurm.sbatch). If the run is saved then, ON_LEAVE (nothing) is done first: there the job is queued again.
set -euo pipefail

RETRIES=${RETRIES:-5}
BACKOFF=${BACKOFF:-5}
PREEMPTED=42
MISTAKE=2

if (($# == 0)); then
  echo "restart.sh: no command; usage: launch/restart.sh python -m niso.main --config=configs/pose_encode.py" >&2
  exit "$MISTAKE"
fi

child=
leaving=0
signalled=0
pass_on= # what tells the child to leave, if not a signal
leave() {
  leaving=1
  signalled=1
  if [[ -n $child && -n $pass_on ]]; then
    bash -c "$pass_on" || echo "restart.sh: PASS_ON failed: $pass_on" >&2
  elif [[ -n $child ]]; then
    kill -TERM "$child" 2>/dev/null || true
  fi
}
trap leave TERM INT

# Runs a command to its end and puts its exit code into `code`; a signal interrupts waiting, not the command.
follow() {
  "$@" &
  child=$!
  if ((leaving)); then # the signal came before there was a child
    kill -TERM "$child" 2>/dev/null || true
  fi
  while true; do
    signalled=0
    code=0
    wait "$child" || code=$?
    if ! ((signalled)); then
      break
    fi
  done
  child=
}

# A number that grows with a new checkpoint: its step; where the command names no --workdir, when the newest below runs/ was
# made. -1 where there is none.
newest() {
  local found=-1 path
  if [[ -z $workdir ]]; then
    found=$(find runs -mindepth 3 -maxdepth 3 -regex '.*/checkpoints/[0-9]+' -printf '%T@\n' 2>/dev/null | sort -n | tail -n 1)
    found=${found/./}
    found=${found:0:16} # microseconds
  elif [[ $workdir == gs://* ]]; then
    found=$("$interpreter" -m launch.newest "$workdir") ||
      echo "restart.sh: $interpreter cannot ask $workdir for checkpoints: all retries count (PYTHON says which to take)" >&2
  else
    for path in "$workdir"/checkpoints/*; do
      if [[ ${path##*/} =~ ^[0-9]+$ ]] && ((10#${path##*/} > found)); then
        found=$((10#${path##*/}))
      fi
    done
  fi
  echo "${found:--1}"
}

workdir=
previous=
interpreter=${PYTHON:-}
for argument in "$@"; do
  if [[ -z $interpreter && ${argument##*/} =~ ^python[0-9.]*$ ]]; then
    interpreter=$argument
  fi
  case $argument in
    --workdir=* | -workdir=*) workdir=${argument#*=} ;;
    *) if [[ $previous == --workdir ]]; then workdir=$argument; fi ;;
  esac
  previous=$argument
done

interpreter=${interpreter:-python}
if [[ ${workdir:0:2} == \~/ ]]; then # as niso.main does
  workdir=${HOME:-}/${workdir:2}
fi

failures=0
pause=$BACKOFF
reached=$(newest)
while true; do
  pass_on=${PASS_ON:-}
  follow "$@"
  pass_on=
  if ((leaving)); then
    if ((code == PREEMPTED)) && [[ -n ${ON_LEAVE:-} ]]; then
      bash -c "$ON_LEAVE" || echo "restart.sh: ON_LEAVE failed: $ON_LEAVE" >&2
    fi
    exit "$code"
  fi
  case $code in
    0 | "$MISTAKE") exit "$code" ;;
    "$PREEMPTED")
      echo "restart.sh: the run was asked to leave and is saved; starting it again" >&2
      continue
      ;;
  esac
  now=$(newest)
  if ((now > reached)); then
    reached=$now
    failures=0
    pause=$BACKOFF
  fi
  failures=$((failures + 1))
  if ((failures > RETRIES)); then
    echo "restart.sh: exit code $code; $RETRIES retries in a row brought no new checkpoint: giving up" >&2
    exit "$code"
  fi
  echo "restart.sh: exit code $code; starting again in $pause s (retry $failures of $RETRIES without a new checkpoint)" >&2
  failed=$code
  follow sleep "$pause"
  if ((leaving)); then
    exit "$failed"
  fi
  pause=$((pause * 2 < 300 ? pause * 2 : 300))
done
