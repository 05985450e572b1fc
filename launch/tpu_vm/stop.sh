#!/usr/bin/env bash
# Stops the training on every host: each finishes its step, saves, and does not start again.
set -euo pipefail

usage="usage: launch/tpu_vm/stop.sh NAME ZONE

Returns when all have ended, or nothing ran. The TPUs stay, and cost, until delete.sh."
[[ ${1-} != --help ]] || { echo "$usage"; exit; }
(($# == 2)) || { echo "error: stop.sh needs NAME and ZONE, like mvit us-west4-a" >&2; exit 2; }

# The lock is free when the last program of the host has ended.
# shellcheck disable=SC2016  # the host's shell reads the file
"$(dirname "$0")/on_all.sh" "$1" "$2" '
if [ ! -d mvit_jax ] || flock -n mvit_jax/train.lock true; then
  echo "$(hostname): nothing runs"
else
  kill -TERM "$(cat mvit_jax/train.pid)" && flock mvit_jax/train.lock echo "$(hostname): stopped"
fi'
