#!/usr/bin/env bash
# Gives the TPUs back, running or not; what is on their disks is gone.
set -euo pipefail

usage="usage: launch/tpu_vm/delete.sh NAME ZONE"
[[ ${1-} != --help ]] || { echo "$usage"; exit; }
(($# == 2)) || { echo "error: delete.sh needs NAME and ZONE, like mvit us-west4-a" >&2; exit 2; }

gcloud compute tpus queued-resources delete "$1" --zone="$2" --force --quiet
echo "$1 is deleted; gcloud compute tpus queued-resources list --zone=$2 shows what is left"
