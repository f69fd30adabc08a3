#!/usr/bin/env bash
# The GPU table on a machine with one GPU: scripts/bench/gpu.sh [SECONDS] [gpu.py's arguments]
# Nothing is begun after SECONDS (540), and what has begun is stopped 45 s later. PYTHON names an interpreter with
# torch, transformers, jax, flax, optax and orbax; WHEELS a folder of wheels of what else a row needs (peft,
# bitsandbytes, trl, datasets), installed into a folder of their own first. Peers that aren't there are left out.
# gpu/PROCESSOR.json is written to OUT, else to docs/bench, after every contestant.
set -euo pipefail
out=${OUT:+$(realpath "$OUT")}
wheels=${WHEELS:+$(realpath "$WHEELS")}
cd "$(dirname "$0")/../.."
seconds=540
if [[ ${1:-} =~ ^[0-9]+$ ]]; then seconds=$1; shift; fi
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -n "$wheels" ]; then
    began=$SECONDS
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    seconds=$((seconds - SECONDS + began))
fi
export PYTHONPATH="$site:$PWD:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
# As ntjax.train: JAX takes 0.92 of the memory at once; its peak is told of what was in use. torch's pieces grow instead
# of leaving gaps.
export XLA_PYTHON_CLIENT_PREALLOCATE=true XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
nvidia-smi --query-gpu=name,memory.total,clocks.sm --format=csv,noheader || echo "no nvidia-smi"
"$python" scripts/bench/gpu.py --seconds "$seconds" ${out:+--out "$out"} "$@"
