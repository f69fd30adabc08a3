#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster that has JobSet, as XPK would start it: a Job a slice, a pod a host.
#
#   scripts/pod/gke.sh --name run1 --image REGION-docker.pkg.dev/PROJECT/ntjax:1 --accelerator tpu-v5-lite-podslice \
#       --topology 4x4 --hosts 4 --chips 4 --claim shared --config configs/sft_smollm2.toml [--slices 2] [--dry-run] \
#       [-- KEY=VALUE ...]
#
# --claim names a PersistentVolumeClaim that all pods may write (Filestore), mounted on /shared. A pod that ends with 75
# or 76 (preempted, a peer lost) has the whole set started again; other codes end it. --dry-run prints the manifest.
set -euo pipefail

name= image= accelerator= topology= hosts= chips=4 slices=1 claim= config= restarts=20 dry=
usage() { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 78; }
while [ $# -gt 0 ]; do
  case $1 in
    --name | --image | --accelerator | --topology | --hosts | --chips | --slices | --claim | --config | --restarts)
      printf -v "${1#--}" %s "$2"; shift 2 ;;
    --dry-run) dry=1; shift ;;
    --) shift; break ;;
    *) echo "gke.sh: unknown option $1" >&2; usage ;;
  esac
done
for given in name image accelerator topology hosts claim config; do
  [ -n "${!given}" ] || { echo "gke.sh: --$given is missing" >&2; usage; }
done

export name image accelerator topology hosts chips slices claim restarts
train="python -m ntjax.train --config $config --output-dir /shared/runs --resume auto"
[ $# -eq 0 ] || train="$train$(printf ' %q' "$@")"
[ "$slices" = 1 ] || train="$train mesh.dcn_data=$slices"
manifest=$(<"$(dirname "$0")/jobset.yaml")
for field in name image accelerator topology hosts chips slices claim restarts train; do
  manifest=${manifest//"{{$field}}"/${!field}}
done
if [ -n "$dry" ]; then
  echo "kubectl apply -f - <<'END'"
  echo "$manifest"
  echo END
else
  kubectl apply -f - <<<"$manifest"
fi
