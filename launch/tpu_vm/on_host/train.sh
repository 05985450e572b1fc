#!/usr/bin/env bash
# On a host: the training program, and again whenever it was preempted. Called by ../train.sh.
#
# It exits with 143 (128 + SIGTERM) when it was asked to stop and has saved, with 134 when it has
# lost another host's process, or waited for it in vain, and with another status above 128 when it
# was killed itself. Then it is started again, the losses 10 times in all, unless the asking came
# through this script (stop.sh, or the host shuts down). Any other status is an error. The last
# status is kept in train.status.
set -euo pipefail
cd "$(dirname "$0")/../../.."
(($# > 0)) || {
  echo "error: train.sh needs the flags of the training program: --config=... --workdir=..." >&2
  exit 2
}

exec 9>train.lock
flock --timeout=1 9 || {
  echo "error: a training is already running on this host: stop it with launch/tpu_vm/stop.sh" >&2
  exit 1
}
rm -f train.status
echo $$ >train.pid

stopping=0 signalled=0 lost=0 program=
# shellcheck disable=SC2329  # by the trap
stop() {
  stopping=1 signalled=1
  [[ -z $program ]] || kill -TERM "$program" 2>/dev/null || true
}
trap stop TERM INT
while true; do
  .venv/bin/python -m mvit_jax.train "$@" &
  program=$!
  ((!stopping)) || stop # the signal came between two starts
  while true; do # a signal ends `wait` before the program has ended
    signalled=0 status=0
    wait "$program" || status=$?
    ((signalled)) || break
  done
  program=
  ((!stopping && (status == 143 || (status >= 128 && ++lost <= 10)))) || break
  echo "preempted, or a process was lost (status $status): the same command goes on"
done
echo "$status" >train.status
rm -f train.pid # the number will be another process's
echo "the training program ended with status $status"
exit "$status"
