#!/usr/bin/env bash
# On a host: this code with its locked dependencies into .venv, and the bucket $1, if one is named,
# mounted as ~/bucket. Called by ../install.sh.
set -euo pipefail
cd "$(dirname "$0")/../../.."

# The hosts' own Python may be older than 3.11; uv brings one along.
if [[ ! -x .venv/bin/python ]]; then
  python3 -m pip install --quiet --user uv==0.13.9
  python3 -m uv venv --quiet --python=3.11 --seed .venv
fi
.venv/bin/python -m pip install --quiet --constraint=requirements.txt \
  --constraint=requirements-dev.txt --editable '.[train,tfds,tpu,gcs]'

if (($# > 0)) && ! mountpoint --quiet ~/bucket; then
  if ! command -v gcsfuse >/dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    repository=https://packages.cloud.google.com/apt
    curl --silent --show-error --fail "$repository/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $repository gcsfuse-$(lsb_release --codename --short) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update --quiet
    sudo apt-get install --quiet --yes gcsfuse
  fi
  mkdir -p ~/bucket
  gcsfuse --implicit-dirs "$1" ~/bucket
fi
.venv/bin/python -c 'import mvit_jax; print("mvit_jax", mvit_jax.__version__, "is installed")'
