#!/usr/bin/env bash
# The run of jobset.yaml by xpk, on a cluster that `xpk cluster create` made.
set -euo pipefail

usage="usage: launch/gke/xpk.sh NAME CLUSTER ZONE TYPE IMAGE FLAGS

  TYPE   like v5litepod-16; SLICES=2 in the environment takes that many
  IMAGE  built from launch/Dockerfile and pushed
  FLAGS  those of python -m mvit_jax.train: --config=... --workdir=...

STORAGE=NAME in the environment mounts what xpk storage attach gave that name.
DRY_RUN=1 in the environment prints what xpk would do, with the JobSet, and starts nothing."
[[ ${1-} != --help ]] || { echo "$usage"; exit; }
(($# >= 6)) || {
  echo "error: xpk.sh needs NAME, CLUSTER, ZONE, TYPE, IMAGE and the flags of the training" \
    "program; launch/gke/xpk.sh --help says more" >&2
  exit 2
}
name=$1 cluster=$2 zone=$3 type=$4 image=$5
shift 5

# xpk starts again on 42 and on 127 to 255, so on 134 and 143. `exec`, so that its SIGTERM reaches
# the program and no shell in between.
xpk workload create --workload="$name" --cluster="$cluster" --zone="$zone" --tpu-type="$type" \
  --num-slices="${SLICES:-1}" --docker-image="$image" --max-restarts=100 \
  --termination-grace-period-seconds=300 ${STORAGE:+--storage="$STORAGE"} \
  ${DRY_RUN:+--dry-run --skip-validation} \
  --command="exec python -m mvit_jax.train$(printf ' %q' "$@")"
