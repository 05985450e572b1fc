#!/usr/bin/env bash
# Starts the training program on every host and returns; it goes on without this machine.
set -euo pipefail

usage="usage: launch/tpu_vm/train.sh NAME ZONE FLAGS

FLAGS are those of python -m mvit_jax.train, which runs in ~/mvit_jax of each host: --config=...
--workdir=../bucket/... where the bucket is mounted, the same on all hosts.
After a preemption that leaves the host alive it starts again by itself (on_host/train.sh). A host
where a training runs is left alone, and makes this fail; all others start."
[[ ${1-} != --help ]] || { echo "$usage"; exit; }
(($# >= 3)) || {
  echo "error: train.sh needs NAME, ZONE and the flags of the training program, like" \
    "mvit us-west4-a --config=configs/kinetics.py:mvit_b_16x4 --workdir=../bucket/runs/b" >&2
  exit 2
}
name=$1 zone=$2
shift 2

# A session of its own, so that the end of this connection is not the end of the training.
"$(dirname "$0")/on_all.sh" "$name" "$zone" \
  "flock --timeout=1 mvit_jax/train.lock rm -f mvit_jax/train.status || {
    echo \"error: \$(hostname): a training is already running (or nothing is installed)\" >&2
    exit 1
  }
  setsid --fork mvit_jax/launch/tpu_vm/on_host/train.sh$(printf ' %q' "$@") \
  >>mvit_jax/train.log 2>&1 </dev/null"
echo "started on all hosts; watch it with launch/tpu_vm/logs.sh $name $zone"
