"""The GPU's kernels: `gpu_checks.py` in Triton's interpreter and on a GPU, and what the compiler makes of them.

python -m pytest tests/test_kernels_gpu.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")
CHECKS = Path(__file__).with_name("gpu_checks.py")


def run_checks(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "--noconftest", "-x", "-p", "no:cacheprovider", str(CHECKS)]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=CHECKS.parent.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def test_in_the_interpreter():
    run_checks(TRITON_INTERPRET="1")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu():
    run_checks()
