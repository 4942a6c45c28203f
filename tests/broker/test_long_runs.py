"""The short forms of `benchmarks/fuzz.py` and `benchmarks/soak.py`, which hold what they promise or end with status 1."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.broker.federation import ROOT, environment

pytestmark = pytest.mark.usefixtures("unmeasured")


def run_benchmark(name: str, *arguments: str, timeout_s: float) -> str:
    command = [sys.executable, f"benchmarks/{name}.py", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.fault(8, 18, 19, 20, 22, 23, 24)
def test_half_a_minute_of_bad_input_to_every_topic_moves_nobody():
    said = run_benchmark("fuzz", "--federation-only", "--seconds", "30", "--seed", "2", timeout_s=400)
    assert "NO  " not in said
    assert "what is refused is counted" in said


@pytest.mark.long
@pytest.mark.fault(1, 3, 4, 16, 31)
def test_three_minutes_of_random_faults_leave_nothing_behind():
    said = run_benchmark("soak", "--minutes", "3", "--seed", "2", timeout_s=600)
    assert "NO  " not in said
