#!/usr/bin/env bash
# Says for every host how its training does.
set -euo pipefail

usage="usage: launch/tpu_vm/status.sh NAME ZONE

A line for each host that answers: running; the status with which the training ended, for good; or
none: it was not started, or the host was."
[[ ${1-} != --help ]] || { echo "$usage"; exit; }
(($# == 2)) || { echo "error: status.sh needs NAME and ZONE, like mvit us-west4-a" >&2; exit 2; }

# flock's own status: 1 where the lock is held, 66 where nothing is installed.
# shellcheck disable=SC2016  # the host's shell reads it
"$(dirname "$0")/on_all.sh" "$1" "$2" 'flock -n mvit_jax/train.lock true 2>/dev/null
[ $? = 1 ] && state=running || state=$(cat mvit_jax/train.status 2>/dev/null || echo none)
echo "training on $(hostname): $state"'
