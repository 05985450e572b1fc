#!/usr/bin/env bash
# Asks for TPUs (a queued resource) and waits until they are there.
set -euo pipefail

usage="usage: launch/tpu_vm/create.sh NAME ZONE TYPE [FLAGS]

  NAME   of the queued resource, as all other scripts take it
  ZONE   like us-west4-a
  TYPE   like v5litepod-16, v4-32, v5p-16, v6e-16
  FLAGS  go to gcloud: --spot, --internal-ips, --service-account=..., --data-disk=...

SLICES=2 in the environment asks for that many slices of TYPE (4 of v5litepod-16 are 64 chips)."
[[ ${1-} != --help ]] || { echo "$usage"; exit; }
(($# >= 3)) || {
  echo "error: create.sh needs NAME, ZONE and TYPE, like mvit us-west4-a v5litepod-16" >&2
  exit 2
}
name=$1 zone=$2 type=$3
shift 3

case $type in # the operating system that goes with each generation
  v4-*) runtime=tpu-ubuntu2204-base ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *)
    echo "error: no runtime is known for TYPE $type: set v4-N, v5litepod-N, v5p-N or v6e-N" >&2
    exit 2
    ;;
esac
nodes=(--node-id="$name")
((${SLICES:-1} == 1)) || nodes=(--node-count="$SLICES" --node-prefix="$name")

left() {
  echo "error: $name was not waited for: the request stays, and costs as soon as it is ACTIVE;" \
    "launch/tpu_vm/delete.sh $name $zone ends it" >&2
}
trap 'left; exit 130' INT TERM HUP

gcloud compute tpus queued-resources create "$name" --zone="$zone" --accelerator-type="$type" \
  --runtime-version="$runtime" "${nodes[@]}" "$@"

unknown=0
while true; do
  if state=$(gcloud compute tpus queued-resources describe "$name" --zone="$zone" \
    --format='value(state.state)'); then
    unknown=0
  else # this machine's network, say
    state="not to be asked"
    ((++unknown < 10)) || { left; exit 1; }
  fi
  case $state in
    ACTIVE) break ;;
    FAILED | SUSPENDING | SUSPENDED)
      echo "error: $name is $state: see gcloud compute tpus queued-resources describe $name" \
        "--zone=$zone, then delete it with launch/tpu_vm/delete.sh $name $zone" >&2
      exit 1
      ;;
  esac
  echo "$name is $state; looking again in ${POLL:=30} seconds"
  sleep "$POLL"
done
echo "$name is ACTIVE; next: launch/tpu_vm/install.sh $name $zone"
