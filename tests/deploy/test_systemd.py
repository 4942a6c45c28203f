"""The systemd units: systemd can read them, they are hardened, and they say what our processes need."""

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.stack import ROOT

UNITS = {"coordinator.service": "coordinator.service", "edge-agent@.service": "edge-agent@pi-3.service"}
"""File, and the name under which an operator starts it."""
ANALYZE = shutil.which("systemd-analyze")

needs_systemd = pytest.mark.skipif(
    ANALYZE is None, reason="systemd-analyze is not installed (Debian: apt install systemd)"
)


def unit_text(file: str) -> str:
    return (ROOT / "deploy" / "systemd" / file).read_text(encoding="utf-8")


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(params=UNITS)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The unit as it would be started, with programs that exist on this machine."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("coordinator", "edge-agent"):
        (programs / name).symlink_to("/bin/true")
    path = tmp_path / UNITS[request.param]
    path.write_text(unit_text(request.param).replace("/opt/midge/bin", str(programs)), encoding="utf-8")
    return path


@needs_systemd
def test_systemd_reads_it_without_a_complaint(unit: Path) -> None:
    result = analyze("verify", "--man=no", str(unit))
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@needs_systemd
def test_it_exposes_little_of_the_machine(unit: Path) -> None:
    # systemd's own scale: 0 to 10 (here in tenths); a service that says nothing of this has about 9.6.
    result = analyze("security", "--offline=yes", "--threshold=25", str(unit))
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.parametrize("file", UNITS)
def test_a_wrong_configuration_is_not_tried_again_and_a_dead_worker_does_not_end_the_service(file: str) -> None:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit_text(file))
    service = parser["Service"]
    assert (service["Restart"], service["RestartPreventExitStatus"]) == ("on-failure", "2")
    assert service["OOMPolicy"] == "continue"
    assert service["KillMode"] == "mixed", "SIGTERM is for the main process, which ends its own child"
    assert service["DynamicUser"] == "yes"
