"""The agent image's health check sees a connection to somebody else, and nothing but that."""

import os
import runpy
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.stack import ROOT

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
HERE, BROKER = "040012AC:C61E", "020012AC:075B"  # 172.18.0.4:50718 and 172.18.0.2:1883
PAIR = ("0100007F:9C40", "0100007F:9C41")
ESTABLISHED, TIME_WAIT, LISTENING = "01", "06", "0A"


def row(here: str, there: str, state: str, inode: int) -> str:
    return f"   0: {here} {there} {state} 00000000:00000000 00:00000000 00000000 10001        0 {inode} 1 0\n"


@pytest.fixture
def main() -> Callable[[Path], int]:
    found: Callable[[Path], int] = runpy.run_path(str(ROOT / "deploy" / "health" / "agent.py"))["main"]
    return found


def proc(folder: Path, *rows: str, sockets: tuple[int, ...] = ()) -> Path:
    """A /proc with a table of connections, and one process that holds these sockets."""
    (folder / "net").mkdir()
    (folder / "net" / "tcp").write_text(HEADER + "".join(rows))
    (folder / "1" / "fd").mkdir(parents=True)
    for number, inode in enumerate(sockets):
        (folder / "1" / "fd" / str(number)).symlink_to(f"socket:[{inode}]")
    return folder


def test_a_connection_of_ours_is_health(main: Callable[[Path], int], tmp_path: Path) -> None:
    assert main(proc(tmp_path, row(HERE, BROKER, ESTABLISHED, 77), sockets=(77,))) == 0


@pytest.mark.parametrize("state", [TIME_WAIT, LISTENING])
def test_one_that_is_over_or_only_listens_is_none(
    main: Callable[[Path], int], tmp_path: Path, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(proc(tmp_path, row(HERE, BROKER, state, 77), sockets=(77,))) == 1
    assert capsys.readouterr().out == "no connection to the broker; see `docker logs` for why\n"


def test_that_of_another_container_of_the_same_network_is_none(main: Callable[[Path], int], tmp_path: Path) -> None:
    assert main(proc(tmp_path, row(HERE, BROKER, ESTABLISHED, 78), sockets=(77,))) == 1


def test_the_pair_by_which_a_process_wakes_itself_is_none(main: Callable[[Path], int], tmp_path: Path) -> None:
    here, there = PAIR
    rows = (row(here, there, ESTABLISHED, 77), row(there, here, ESTABLISHED, 78))
    assert main(proc(tmp_path, *rows, sockets=(77, 78))) == 1


def test_a_broker_on_the_same_machine_counts_although_its_own_end_is_in_the_table(
    main: Callable[[Path], int], tmp_path: Path
) -> None:
    here, there = PAIR
    rows = (row(here, there, ESTABLISHED, 77), row(there, here, ESTABLISHED, 78))
    assert main(proc(tmp_path, *rows, sockets=(77,))) == 0


def test_the_kernels_own_tables_are_read_as_they_are(main: Callable[[Path], int], tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as ours,
        server.accept()[0],
    ):
        (tmp_path / "net").symlink_to("/proc/self/net")
        (tmp_path / "1" / "fd").mkdir(parents=True)
        (tmp_path / "1" / "fd" / "0").symlink_to(f"socket:[{os.fstat(ours.fileno()).st_ino}]")
        assert main(tmp_path) == 0
