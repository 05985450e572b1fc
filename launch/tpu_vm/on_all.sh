#!/usr/bin/env bash
# Runs a command on every host of the TPUs, all at once, and prints what they print.
set -euo pipefail

usage="usage: launch/tpu_vm/on_all.sh NAME ZONE COMMAND

COMMAND is one word, for a shell on each host: 'df -h / ; ls mvit_jax'."
[[ ${1-} != --help ]] || { echo "$usage"; exit; }
(($# == 3)) || {
  echo "error: on_all.sh needs NAME, ZONE and one quoted COMMAND, like mvit us-west4-a 'df -h'" >&2
  exit 2
}

gcloud compute tpus queued-resources ssh "$1" --zone="$2" --node=all --worker=all --command="$3"
