"""What the launchers of pods would run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

POD = Path(__file__).parents[1] / "scripts" / "pod"
CONFIG = "configs/sft_smollm2.toml"
GKE = "--name run1 --image img --accelerator tpu-v5-lite-podslice --topology 4x4 --hosts 4 --claim shared"
GCLOUD = (
    "--name pod --zone us-west4-a --type v5litepod-16 --output-dir /mnt/s/runs --repo https://example.com/x"
)


def prints(script: str, *args: str) -> str:
    return subprocess.run(
        [POD / script, *args], check=True, capture_output=True, text=True, cwd=POD.parents[1]
    ).stdout


def test_a_tpu_slice_is_made_set_up_and_trained_on() -> None:
    lines = prints(
        "gcloud_tpu.sh", *GCLOUD.split(), "--config", CONFIG, "--dry-run", "--", "seed=1"
    ).splitlines()
    create, setup, train = (line.replace("\\", "") for line in lines)
    assert "tpu-vm create pod --zone us-west4-a --accelerator-type v5litepod-16" in create
    assert "--worker=all" in setup
    assert "scripts/setup tpu" in setup
    assert f"-m ntjax.train --config {CONFIG} --output-dir /mnt/s/runs --resume auto seed=1" in train


def test_a_jobset_has_a_job_a_slice_and_a_pod_a_host() -> None:
    said = prints("gke.sh", *GKE.split(), "--config", CONFIG, "--slices", "2", "--dry-run", "--", "seed=1")
    manifest = yaml.safe_load("\n".join(said.splitlines()[1:-1]))
    assert "{{" not in said
    (group,) = manifest["spec"]["replicatedJobs"]
    assert group["replicas"] == 2
    job = group["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (4, 4)
    refused = job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert not {75, 76} & set(refused)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    command = pod["containers"][0]["command"][-1]
    assert command == (
        f"exec python -m ntjax.train --config {CONFIG} --output-dir /shared/runs --resume auto seed=1 mesh.dcn_data=2"
    )


def test_slurm_starts_a_process_a_node_with_all_its_gpus() -> None:
    said = prints("slurm.sbatch", "--dry-run", CONFIG, "seed=1").splitlines()
    assert said[0] == "JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7"
    assert said[1].strip() == (
        f"srun --kill-on-bad-exit=1 .venv/bin/python -m ntjax.train --config {CONFIG} --resume auto seed=1"
    )


@pytest.mark.parametrize("script", ["gcloud_tpu.sh", "gke.sh", "slurm.sbatch"])
def test_a_launcher_says_what_is_missing(script: str) -> None:
    ended = subprocess.run([POD / script], capture_output=True, text=True)
    assert ended.returncode == 78
    assert "is missing" in ended.stderr or "which config?" in ended.stderr
