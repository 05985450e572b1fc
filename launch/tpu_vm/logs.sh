#!/usr/bin/env bash
# Follows the log of one host; Ctrl-C ends the looking, not the training.
set -euo pipefail

usage="usage: launch/tpu_vm/logs.sh NAME ZONE [HOST [SLICE]]

HOST and SLICE count from 0, which is where the progress is printed; errors are on the host that
had them."
[[ ${1-} != --help ]] || { echo "$usage"; exit; }
(($# >= 2 && $# <= 4)) || {
  echo "error: logs.sh needs NAME and ZONE, like mvit us-west4-a, and at most HOST and SLICE" >&2
  exit 2
}

gcloud compute tpus queued-resources ssh "$1" --zone="$2" --node="${4:-0}" --worker="${3:-0}" \
  --command='tail -n 100 -F mvit_jax/train.log'
