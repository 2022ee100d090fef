#!/usr/bin/env bash
# N processes on this machine that train one run together, as the hosts of a pod do:
#
#   launch/local.sh 2 --config=configs/pose_encode.py:quick
#
# Process 0 speaks on the terminal, the others into files, named if something goes wrong. When one process fails the others are
# ended GRACE seconds later (15: longer than they take to notice by themselves) and its exit code is this script's. Ctrl-C and
# SIGTERM go to all: they save, and leave with 42; a second one kills them. GPUs are dealt out evenly.
# PYTHON names the interpreter, LOGS the folder of the files (a new one, kept where something goes wrong).
set -euo pipefail

PYTHON=${PYTHON:-python}
GRACE=${GRACE:-15}
PREEMPTED=42
AGAIN=1

if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "local.sh: usage: launch/local.sh N --config=configs/pose_encode.py:quick, with a number N of processes" >&2
  exit 2
fi
count=$1
shift

port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
gpus=0
if ((count > 1)) && [[ -z ${CUDA_VISIBLE_DEVICES:-} ]] && command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
fi
if [[ -n ${LOGS:-} ]]; then
  logs=$LOGS
  mkdir -p "$logs"
else
  logs=$(mktemp -d)
fi

children=()
signals=0
# Sends a signal to all that still run.
end() {
  local pid
  for pid in "${children[@]}"; do
    kill -"$1" "$pid" 2>/dev/null || true
  done
}
# shellcheck disable=SC2317,SC2329  # the trap calls it
forward() {
  signals=$((signals + 1))
  local name=TERM
  if ((signals > 1)); then name=KILL; fi
  end "$name"
}
trap forward TERM INT

for ((i = 0; i < count; i++)); do
  command=("$PYTHON" -m niso.main "$@" --coordinator="127.0.0.1:$port" --processes="$count" --process_id="$i")
  if ((gpus >= count)); then
    share=$((gpus / count))
    command=(env CUDA_VISIBLE_DEVICES="$(seq -s, $((i * share)) $(((i + 1) * share - 1)))" "${command[@]}")
  fi
  if ((i == 0)); then
    "${command[@]}" &
  else
    "${command[@]}" >>"$logs/process_$i.log" 2>&1 &
  fi
  children+=($!)
done

# The code that says most is the run's, the first of several: 42 only if nobody says worse, and 1 is what those end with, too,
# who see that another process is gone.
weight() {
  case $1 in
    0) echo 0 ;;
    "$PREEMPTED") echo 1 ;;
    "$AGAIN") echo 2 ;;
    *) echo 3 ;;
  esac
}
result=0
culprit=
hurried=0
running=("${!children[@]}")
failed_at=
while ((${#running[@]})); do
  still=()
  for i in "${running[@]}"; do
    if kill -0 "${children[i]}" 2>/dev/null; then
      still+=("$i")
      continue
    fi
    code=0
    wait "${children[i]}" || code=$?
    if ((!hurried && $(weight "$code") > $(weight "$result"))); then
      result=$code
      culprit=$i
    fi
  done
  running=(${still[@]+"${still[@]}"})
  if ((result != 0)) && ((${#running[@]})); then
    failed_at=${failed_at:-$SECONDS}
    if ((SECONDS - failed_at >= GRACE)); then
      hurried=1
      end KILL
    fi
  fi
  if ((${#running[@]})); then
    sleep 0.1 &
    wait $! || true # a signal interrupts it
  fi
done

if ((result != 0 && result != PREEMPTED && signals == 0)); then
  echo "local.sh: process $culprit of $count ended with code $result; what processes from 1 on said: $logs/process_*.log" >&2
elif [[ -z ${LOGS:-} ]]; then
  rm -r "$logs"
fi
exit "$result"
