"""What an agent costs while it waits: memory and processor time, over a Mosquitto that this script starts.

python benchmarks/idle_agent.py [--seconds 20]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from midge.transport.brokers import start_local_broker

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to watch")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="midge-idle-") as name:
        directory = Path(name)
        with start_local_broker("mosquitto", directory=directory / "broker") as broker:
            command = [sys.executable, "-m", "edge_agent", "run", "--broker", broker.url, "--agent-id", "idle"]
            agent = subprocess.Popen(
                [*command, "--state-dir", str(directory / "agent"), "--log-level", "warning"], cwd=ROOT
            )
            bare = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"])
            try:
                time.sleep(3.0)  # it starts and connects
                process = psutil.Process(agent.pid)
                while process.children():  # the one that looks at the data when an agent starts
                    time.sleep(0.5)
                before = process.cpu_times()
                time.sleep(options.seconds)
                after = process.cpu_times()
                busy_s = (after.user - before.user) + (after.system - before.system)
                rss_mb = process.memory_info().rss / 2**20
                bare_mb = psutil.Process(bare.pid).memory_info().rss / 2**20
                loaded = Path(f"/proc/{agent.pid}/maps").read_text(encoding="utf-8")
                heavy = [library for library in ("numpy", "torch") if f"/{library}/" in loaded]
                print(f"processes   {1 + len(process.children(recursive=True))}")
                print(
                    f"memory      {rss_mb:.1f} MB resident ({rss_mb / bare_mb:.1f} times a bare Python's {bare_mb:.1f} MB)"
                )
                print(f"processor   {busy_s / options.seconds:.2%} of a core over {options.seconds:g} s")
                print(f"loaded      {', '.join(heavy) or 'neither numpy nor torch'}")
            finally:
                for child in (agent, bare):
                    child.terminate()
                    child.wait()


if __name__ == "__main__":
    main()
