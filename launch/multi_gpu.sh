#!/usr/bin/env bash
# Runs one command of ssl-jax on several hosts with GPUs, over ssh, without a scheduler. Ctrl-C saves and ends the run.
#
#   HOSTS="gpu1 gpu2" launch/multi_gpu.sh pretrain \
#       --config=imagenet:simclr --config.data.path=/shared/imagenet --workdir=/shared/runs/simclr
#
# HOSTS     hosts that ssh reaches without a password; the first one coordinates. "localhost" is this host, without ssh
# PORT      port of the first host where the others connect (default: 12355)
# SSL_JAX   path of the program, such as /shared/venv/bin/ssl-jax, if it is not on their PATH
# All hosts must see --workdir and the data. A single host needs no script: ssl-jax uses all its GPUs.
set -uo pipefail

if (($# == 0)) || [[ -z ${HOSTS:-} ]]; then
  sed -n '2,10p' "$0" | cut -c3- >&2
  exit 2
fi
read -ra hosts <<<"$HOSTS"
printf -v command ' %q' "${SSL_JAX:-ssl-jax}" "$@"
processes=()
for number in "${!hosts[@]}"; do
  variables="JAX_COORDINATOR_ADDRESS=${hosts[0]}:${PORT:-12355} JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$number"
  numbered="export $variables; exec$command"
  if [[ ${hosts[number]} == localhost ]]; then
    bash -c "$numbered" &
  else # -tt: a signal to this script reaches the process on that host
    ssh -tt "${hosts[number]}" "$numbered" </dev/null &
  fi
  processes+=($!)
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null' INT TERM
worst=0
for process in "${processes[@]}"; do
  wait "$process"
  code=$?
  while ((code > 128)) && kill -0 "$process" 2>/dev/null; do # the trap woke us, but the process is still saving
    wait "$process"
    code=$?
  done
  ((code > worst)) && worst=$code
done
exit "$worst"
