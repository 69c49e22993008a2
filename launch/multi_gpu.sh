#!/usr/bin/env bash
# One run on several hosts with GPUs and no scheduler: the same command on each host, over ssh. Ctrl-C saves and ends it.
#
#   HOSTS="gpu1 gpu2" launch/multi_gpu.sh pretrain --config=imagenet:simclr --config.data.path=/shared/imagenet --workdir=/shared/runs/simclr
#
# HOSTS     names that ssh knows, all of them without a password; the first one leads. "localhost" is this host, without ssh
# PORT      where the others find the first one (12355)
# SSL_JAX   the program, if it is not on their PATH (/shared/venv/bin/ssl-jax)
# --workdir and the data must be on a file system that all share. GPUs of a single host need no script: ssl-jax takes all.
set -uo pipefail

if (($# == 0)) || [[ -z ${HOSTS:-} ]]; then
  sed -n '2,9p' "$0" | cut -c3- >&2
  exit 2
fi
read -ra hosts <<<"$HOSTS"
printf -v command ' %q' "${SSL_JAX:-ssl-jax}" "$@"
processes=()
for number in "${!hosts[@]}"; do
  joined="export JAX_COORDINATOR_ADDRESS=${hosts[0]}:${PORT:-12355} JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$number; exec$command"
  if [[ ${hosts[number]} == localhost ]]; then
    bash -c "$joined" &
  else # -tt: a signal here reaches the process there
    ssh -tt "${hosts[number]}" "$joined" </dev/null &
  fi
  processes+=($!)
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null' INT TERM
worst=0
for process in "${processes[@]}"; do
  wait "$process"
  code=$?
  while ((code > 128)) && kill -0 "$process" 2>/dev/null; do # woken by the trap, the process still saves
    wait "$process"
    code=$?
  done
  ((code > worst)) && worst=$code
done
exit "$worst"
