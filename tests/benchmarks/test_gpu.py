"""The GPU benchmark runs end to end without a GPU, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("gpu.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can run the benchmark itself")
def test_every_job_of_the_gpu_benchmark_runs_and_agrees_with_the_reference() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}

    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), "--dry"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8
    assert all(line.endswith(": ok") for line in done.stdout.splitlines())
