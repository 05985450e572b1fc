#!/usr/bin/env bash
# Brings the last commit of this clone to every host and installs it there.
set -euo pipefail

usage="usage: launch/tpu_vm/install.sh NAME ZONE [BUCKET]

What is not committed does not travel. Run again, it replaces the code, what git has deleted too,
and leaves ~/mvit_jax/.venv, logs and compiled programs where they are; a host where a training runs
is left alone, and makes this fail. BUCKET, without gs://, is mounted as ~/bucket."
[[ ${1-} != --help ]] || { echo "$usage"; exit; }
(($# == 2 || $# == 3)) || {
  echo "error: install.sh needs NAME and ZONE, like mvit us-west4-a, and at most a BUCKET" >&2
  exit 2
}
name=$1 zone=$2 bucket=${3-}
here=$(cd "$(dirname "$0")" && pwd)

# On a host: the files of the last time go, by their list.
# shellcheck disable=SC2016  # the host's shell reads it
unpack='mkdir -p mvit_jax && { flock -n mvit_jax/train.lock true || {
  echo "error: $(hostname): a training is running; stop it with launch/tpu_vm/stop.sh" >&2
  exit 1
}; } && touch mvit_jax.list && xargs -d "\n" rm -f <mvit_jax.list &&
tar -tzf mvit_jax.tar.gz | grep -v "/$" >mvit_jax.list && tar -xzf mvit_jax.tar.gz'

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$here/../.." archive --format=tar.gz --prefix=mvit_jax/ --output="$archive" HEAD
gcloud compute tpus queued-resources scp "$archive" "$name:mvit_jax.tar.gz" --zone="$zone" \
  --node=all --worker=all
"$here/on_all.sh" "$name" "$zone" \
  "$unpack && mvit_jax/launch/tpu_vm/on_host/install.sh${bucket:+ $bucket}"
