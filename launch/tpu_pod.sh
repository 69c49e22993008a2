#!/usr/bin/env bash
# A run on a Cloud TPU slice, from creating the slice to deleting it. Needs `gcloud`, logged in.
#
#   launch/tpu_pod.sh create                            requests the slice and waits until it is there
#   launch/tpu_pod.sh install                           installs ssl_jax from this checkout on all workers
#   launch/tpu_pod.sh start pretrain --config=... --workdir=gs://... or a shared disk
#   launch/tpu_pod.sh tail                              follows the log of worker 0
#   launch/tpu_pod.sh resume pretrain --config=...      after maintenance or preemption: create, install and start again
#   launch/tpu_pod.sh stop                              sends SIGTERM: the run saves its step and ends
#   launch/tpu_pod.sh delete
#
# --dry-run before the command prints the calls instead of making them. Settings come from the environment:
#   TPU_NAME   name of the slice (ssl-jax)         TPU_ZONE     such as us-central1-a
#   TPU_TYPE   such as v5litepod-64, v6e-256       TPU_VERSION  runtime of the workers, such as v2-alpha-tpuv5-lite
#   TPU_SPOT   1: cheaper, may be preempted        TPU_PROJECT  default: the project of gcloud
set -euo pipefail

usage() { sed -n '2,15p' "$0" | cut -c3-; }

dry=
if [[ ${1:-} == --dry-run ]]; then
  dry=1
  shift
fi
if (($# == 0)) || [[ $1 == --help ]]; then
  usage
  exit 2
fi
command=$1
shift

name=${TPU_NAME:-ssl-jax}
: "${TPU_ZONE:?is not set; allowed: a zone with this type of TPU, such as us-central1-a}"
where=("--zone=$TPU_ZONE")
if [[ -n ${TPU_PROJECT:-} ]]; then where+=("--project=$TPU_PROJECT"); fi
here=$(cd "$(dirname "$0")/.." && pwd)
# The run outlives the connection that starts it; each worker keeps its own log.
log=ssl-jax.log

run() {
  if [[ -n $dry ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

on_workers() { # number of the worker, or all; command
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

create() {
  : "${TPU_TYPE:?is not set; allowed: a type such as v5litepod-64}"
  : "${TPU_VERSION:?is not set; allowed: a runtime such as v2-alpha-tpuv5-lite}"
  local spot=()
  if [[ ${TPU_SPOT:-0} == 1 ]]; then spot=(--spot); fi
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" "--node-id=$name" \
    "--accelerator-type=$TPU_TYPE" "--runtime-version=$TPU_VERSION" "${spot[@]}"
  if [[ -n $dry ]]; then return; fi
  local state=
  until [[ $state == ACTIVE ]]; do
    state=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
    case $state in
      FAILED | SUSPENDED) echo "$name: $state" >&2 && exit 1 ;;
      ACTIVE) ;;
      *) echo "$name: $state" && sleep 30 ;;
    esac
  done
}

delete() { run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet; }

install() {
  local package
  package=${dry:+PACKAGE.tgz}
  if [[ -z $dry ]]; then
    package=$(mktemp --suffix=.tgz)
    git -C "$here" archive --format=tgz --prefix=ssl_jax/ --output="$package" HEAD
  fi
  run gcloud compute tpus tpu-vm scp "$package" "$name:ssl_jax.tgz" "${where[@]}" --worker=all
  on_workers all "tar xzf ssl_jax.tgz && python3 -m venv venv && venv/bin/pip install -q 'jax[tpu]' ./ssl_jax"
}

start() {
  if (($# == 0)); then
    echo "start: no command; allowed: one of ssl-jax, such as pretrain --config=... --workdir=..." >&2
    exit 2
  fi
  local quoted cluster=
  printf -v quoted ' %q' "${@:2}"
  if [[ $1 == pretrain ]]; then cluster=" --cluster"; fi
  on_workers all "nohup venv/bin/ssl-jax $(printf '%q' "$1")$cluster$quoted >> $log 2>&1 < /dev/null & echo started"
}

case $command in
  create) create ;;
  install) install ;;
  start) start "$@" ;;
  tail) on_workers 0 "tail -n 50 -f $log" ;;
  stop) on_workers all "pkill -TERM -f bin/ssl-jax" ;;
  delete) delete ;;
  resume) # the name of a preempted slice is taken until it is deleted
    delete || true
    create
    install
    start "$@"
    ;;
  *)
    echo "$command: unknown; allowed: create, install, start, tail, resume, stop, delete" >&2
    exit 2
    ;;
esac
