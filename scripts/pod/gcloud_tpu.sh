#!/usr/bin/env bash
# A run on a Cloud TPU slice: makes the slice if it isn't there, sets every host up, and trains on all of them.
#
#   scripts/pod/gcloud_tpu.sh --name pod --zone us-west4-a --type v5litepod-16 --config configs/sft_smollm2.toml \
#       --output-dir /mnt/shared/runs [--dry-run] [-- KEY=VALUE ...]
#
# Every host writes checkpoints: --output-dir is a folder they share (Filestore mounted on all of them, --mount).
# JAX finds the hosts by itself. A run that was preempted or lost a host (75, 76, an abort) is started again and goes on.
set -euo pipefail

name= zone= type= config= output= mount= dry=
runtime=v2-alpha-tpuv5-lite repo=$(git config --get remote.origin.url || true) revision=$(git rev-parse HEAD)
restarts=20
usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 78; }
while [ $# -gt 0 ]; do
  case $1 in
    --name) name=$2; shift 2 ;;
    --zone) zone=$2; shift 2 ;;
    --type) type=$2; shift 2 ;;
    --runtime) runtime=$2; shift 2 ;;
    --config) config=$2; shift 2 ;;
    --output-dir) output=$2; shift 2 ;;
    --mount) mount=$2; shift 2 ;; # SERVER:/SHARE, on the folder above --output-dir
    --repo) repo=$2; shift 2 ;;
    --restarts) restarts=$2; shift 2 ;;
    --dry-run) dry=1; shift ;;
    --) shift; break ;;
    *) echo "gcloud_tpu.sh: unknown option $1" >&2; usage ;;
  esac
done
for given in name zone type config output repo; do
  [ -n "${!given}" ] || { echo "gcloud_tpu.sh: --${given/output/output-dir} is missing" >&2; usage; }
done

do_() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
on_all() { do_ gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"; }

if [ -n "$dry" ] || ! gcloud compute tpus tpu-vm describe "$name" --zone "$zone" >/dev/null 2>&1; then
  do_ gcloud compute tpus tpu-vm create "$name" --zone "$zone" --accelerator-type "$type" --version "$runtime"
fi
if [ -n "$mount" ]; then
  on_all "sudo mkdir -p $(dirname "$output") && (mountpoint -q $(dirname "$output") || sudo mount $mount $(dirname "$output"))"
fi
on_all "test -d ntjax || git clone $repo ntjax; cd ntjax && git fetch -q && git checkout -q $revision && scripts/setup tpu"

train="cd ntjax && .venv/bin/python -m ntjax.train --config $config --output-dir $output --resume auto"
[ $# -eq 0 ] || train="$train$(printf ' %q' "$@")"
for attempt in $(seq 0 "$restarts"); do
  code=0
  on_all "$train" || code=$?
  case $code in
    0) exit 0 ;;
    75 | 76 | 134 | 137 | 255) echo "gcloud_tpu.sh: ended with $code, starting again ($attempt of $restarts)" >&2 ;;
    *) exit "$code" ;;
  esac
done
exit "$code"
