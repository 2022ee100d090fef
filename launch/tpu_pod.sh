#!/usr/bin/env bash
# A run on a Cloud TPU pod, its machine queued for, set up and used from here with gcloud:
#
#   export TPU=niso ZONE=us-west4-a TYPE=v5litepod-16
#   launch/tpu_pod.sh create && launch/tpu_pod.sh install
#   launch/tpu_pod.sh run --config=configs/pose_encode.py --config.data.records=gs://BUCKET/co3d --workdir=gs://BUCKET/run
#
#   create          asks for the machine and waits for it (SPOT=1: one that may be taken away; VERSION: its software)
#   install         copies the last commit of this folder to all hosts and installs it
#   mount WHAT      SERVER:/SHARE of NFS, or a bucket by its name (which gs:// needs not), at /mnt/niso on all hosts
#   run ARGUMENT..  starts niso.main with the arguments on all hosts, in the background, again after interruptions
#   logs            what host 0 says, as it says it
#   stop            asks the run to save and leave
#   delete          gives the machine back
#
# DRY=1 prints the commands instead.
set -euo pipefail

TPU=${TPU:-niso}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}

usage() {
  echo "tpu_pod.sh: $1; usage: launch/tpu_pod.sh create|install|mount WHAT|run ARGUMENTS|logs|stop|delete" >&2
  exit 2
}

gcloud_tpus() {
  if [[ -n ${DRY:-} ]]; then
    printf '%q ' gcloud compute tpus "$@"
    echo
  else
    command -v gcloud >/dev/null || usage "gcloud is not installed"
    gcloud compute tpus "$@"
  fi
}

# Runs a line of shell on all hosts, or on one.
on() {
  gcloud_tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
}

create() {
  gcloud_tpus queued-resources create "$TPU" --node-id="$TPU" --zone="$ZONE" --accelerator-type="$TYPE" \
    --runtime-version="$VERSION" ${SPOT:+--spot}
  local state=
  while [[ -z ${DRY:-} && $state != ACTIVE ]]; do
    state=$(gcloud_tpus queued-resources describe "$TPU" --zone="$ZONE" --format='value(state.state)')
    case $state in
      FAILED | SUSPENDED)
        echo "tpu_pod.sh: $TPU is $state; look: gcloud compute tpus queued-resources describe $TPU --zone=$ZONE" >&2
        exit 1
        ;;
      ACTIVE) ;;
      *) sleep 20 ;;
    esac
  done
}

install() {
  local folder
  folder=$(mktemp -d)
  git archive --format=tar.gz --output="$folder/niso.tar.gz" HEAD
  gcloud_tpus tpu-vm scp "$folder/niso.tar.gz" "$TPU:" --zone="$ZONE" --worker=all
  rm -r "$folder"
  on all "mkdir -p niso && tar -xzf niso.tar.gz -C niso && sudo apt-get update -q && sudo apt-get install -y -q python3.11-venv && python3.11 -m venv niso/.venv && niso/.venv/bin/pip install -q -e 'niso[tpu,gcs]'"
}

mount() {
  local what=${1#gs://}
  case $what in
    "") usage "mount: name a bucket, or SERVER:/SHARE" ;;
    *:/*) on all "sudo apt-get install -y -q nfs-common && sudo mkdir -p /mnt/niso && sudo mount -t nfs $(printf %q "$what") /mnt/niso && sudo chmod a+rwx /mnt/niso" ;;
    # A checkpoint gets its name when it is whole: renaming a folder is one operation in buckets with a hierarchical namespace.
    *) on all "sudo mkdir -p /mnt/niso && sudo chown \$USER /mnt/niso && { command -v gcsfuse > /dev/null || { echo gcsfuse is not on this image: install it, or mount NFS >&2; exit 1; }; } && gcsfuse --implicit-dirs $(printf %q "$what") /mnt/niso" ;;
  esac
}

run() {
  (($#)) || usage "run: no arguments for niso.main"
  local workdir=0 argument
  for argument in "$@"; do
    if [[ $argument == --workdir* ]]; then workdir=1; fi
  done
  ((workdir)) || usage "run: give a --workdir=... that all hosts see"
  # An ssh that breaks must not end the run: it has a session of its own.
  on all "cd niso && export PATH=\$PWD/.venv/bin:\$PATH && { setsid nohup launch/restart.sh python -m niso.main $(printf '%q ' "$@")> run.log 2>&1 < /dev/null & echo \$! > run.pid; }"
}

case ${1:-} in
  create) create ;;
  install) install ;;
  mount) mount "${2:-}" ;;
  run) run "${@:2}" ;;
  logs) on 0 "tail -n 100 -f niso/run.log" ;;
  stop) on all "kill -TERM \$(cat niso/run.pid)" ;;
  delete) gcloud_tpus queued-resources delete "$TPU" --zone="$ZONE" --force --quiet ;;
  *) usage "unknown command '${1:-}'" ;;
esac
