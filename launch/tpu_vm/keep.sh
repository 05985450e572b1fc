#!/usr/bin/env bash
# A whole run on spot TPUs: asks for them anew whenever they are taken away, until it is complete.
set -euo pipefail

usage="usage: launch/tpu_vm/keep.sh NAME ZONE TYPE BUCKET FLAGS

BUCKET, without gs://, is mounted as ~/bucket, and FLAGS are those of python -m mvit_jax.train,
which runs in ~/mvit_jax: --workdir=../bucket/... outlives the TPUs. Runs here as long as the
training does: on a machine that stays on. Deletes the TPUs when the run is complete, and leaves
them where it failed. The same command again takes over what there is."
[[ ${1-} != --help ]] || { echo "$usage"; exit; }
(($# >= 5)) || {
  echo "error: keep.sh needs NAME, ZONE, TYPE, BUCKET and the flags of the training" \
    "program, like mvit us-west4-a v5litepod-16 my-bucket" \
    "--config=configs/kinetics.py:mvit_b_16x4 --workdir=../bucket/runs/b" >&2
  exit 2
}
name=$1 zone=$2 type=$3 bucket=$4
shift 4
here=$(cd "$(dirname "$0")" && pwd)
poll=${POLL:-60}

# shellcheck disable=SC2329  # by the trap
left() {
  (($? == 0)) || echo "error: keep.sh ended: what $name has, or still gets, stays and costs; the" \
    "same command goes on with it, launch/tpu_vm/delete.sh $name $zone ends it" >&2
}
trap left EXIT
trap 'exit 130' INT TERM HUP

state() { # empty where there is no such resource
  until gcloud compute tpus queued-resources list --zone="$zone" \
    --filter="name ~ /queuedResources/$name\$" --format='value(state.state)'; do
    sleep "$poll" # this machine's network, say: asked again
  done
}
hosts() { # what status.sh says of them, each word once; "silent" where not all answer
  local told silent=
  told=$(timeout 300 "$here/status.sh" "$name" "$zone" </dev/null 2>/dev/null) || silent=silent
  sed -n 's/^training on .*: //p' <<<"$told" | sort -u | xargs echo $silent
}
start() { # on hosts where none runs; whether it does then, `hosts` says
  # Without the bucket, which install.sh mounts, a host would write to its own disk. It fails, too,
  # because of hosts where the training runs.
  if timeout --foreground 3600 "$here/install.sh" "$name" "$zone" "$bucket" ||
    [[ $told == *running* ]]; then
    timeout --foreground 600 "$here/train.sh" "$name" "$zone" "$@" || true
  fi
}

# How often training was started on these TPUs; what the hosts said last, and how often in a row, if
# it was not that all run; how long to wait before the next request (s).
starts=0 said=running odd=0 pause=0
while true; do
  case $(state) in
    ACTIVE) pause=0 ;;
    "")
      starts=0
      "$here/create.sh" "$name" "$zone" "$type" --spot || [[ -n $(state) ]] || exit 1
      continue
      ;;
    FAILED | SUSPENDED)
      echo "$name was taken away, or did not come; asking for it again in $pause seconds"
      "$here/delete.sh" "$name" "$zone" || true # seen by its state
      sleep "$pause"
      pause=$((2 * pause + poll < 3600 ? 2 * pause + poll : 3600))
      continue
      ;;
    *)
      sleep "$poll"
      continue
      ;;
  esac

  told=$(hosts)
  if ((starts == 0)); then
    starts=1
    [[ $told == *running* ]] || start "$@"
    continue
  fi
  case $told in
    running)
      said=running
      sleep "$poll"
      continue
      ;;
    0)
      until "$here/delete.sh" "$name" "$zone"; do
        sleep "$poll"
        [[ -n $(state) ]] || break
      done
      exit 0
      ;;
  esac

  # Hosts end one after the other, and before the state says that the TPUs are taken away: nothing
  # is concluded before they said the same five times.
  sleep "$poll"
  [[ $told == "$said" ]] || odd=0
  said=$told
  ((++odd >= 5)) || continue
  failed=0 lost=0
  for word in $told; do
    case $word in
      running | silent | 0) ;;
      none | 12[89] | 1[3-9]? | 2??) lost=1 ;;
      *) failed=1 ;;
    esac
  done
  if ((!failed && lost && starts <= 5)) && [[ $told != *silent* ]]; then
    echo "the hosts say: $told; starting again where nothing runs"
    starts=$((starts + 1)) said=running
    start "$@"
  elif ((failed)) || [[ $told != *running* && ($told != *silent* || $odd -ge 15) ]]; then
    echo "error: the training ended: the hosts say $told; see launch/tpu_vm/status.sh $name $zone" \
      "and launch/tpu_vm/logs.sh $name $zone" >&2
    exit 1
  fi
done
