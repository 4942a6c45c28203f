"""How fast and in how much memory a round is aggregated.

    python benchmarks/aggregate.py [--dir DIR]

Speed: bytes of updates folded in a second, from the spool (in the page cache) to the next model's file, against `np.copyto`
of as many bytes from memory to memory in the same run, whose share is the ratio. "stored" adds the digest and the sync.
It is measured both ways, NumPy's and, where numba is installed, the compiled one (coordinator/kernel.py).
Memory: what aggregation adds to the peak resident set of a fresh process, for cohorts of several sizes: it must not grow.
What loading numba adds comes once in a process, and is shown apart.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregate import CountedUpdate, Fold
from coordinator.kernel import Kernel, compiled, kernel_for
from coordinator.models import ModelStore
from coordinator.server_state import ServerState
from coordinator.spool import RoundSpool, Spool
from coordinator.strategies import Step, make_strategy
from midge.wire.codecs import FLOAT32, encode_float32
from midge.wire.frames import ELEMENT_BYTES, Framing, content_tag, encode_frame, plan_framing, run_tag

RUN = "benchmark"
COHORTS = (2, 20, 200)
MEMORY_ELEMENTS = 1_000_000


@dataclass(frozen=True)
class Round:
    """A round, ready to be aggregated."""

    models: ModelStore
    base_digest: str
    spool: RoundSpool
    updates: list[CountedUpdate]
    framing: Framing

    @property
    def size_bytes(self) -> int:
        """Bytes of elements in all updates."""
        return len(self.updates) * self.framing.num_elements * ELEMENT_BYTES


def tag_of(agent_num: int) -> bytes:
    """The content tag of an agent's update."""
    return content_tag(hashlib.sha256(str(agent_num).encode()).hexdigest())


def prepare(directory: Path, num_updates: int, num_elements: int) -> Round:
    """Fill a spool: updates of random values, frames of all agents interleaved as they come in a real round."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(num_elements, np.float32)
    models = ModelStore(directory / "models")
    base_digest = models.save_state({"weight": base})
    framing = plan_framing(num_elements)
    spool = Spool(directory / "spool").round(RUN, 1)
    for index in range(framing.num_frames):
        start, stop = framing.span(index)
        for agent_num in range(num_updates):
            encoded = encode_frame(
                codec=FLOAT32,
                run_tag=run_tag(RUN),
                round_num=1,
                index=index,
                num_elements=stop - start,
                content_tag=tag_of(agent_num),
                body=encode_float32(base[start:stop] * np.float32(1 + agent_num / 1000)),
            )
            spool.append(f"agent-{agent_num:04d}", encoded, bytes(32), 0.0)
    return Round(models, base_digest, spool, counted(num_updates), framing)


def counted(num_updates: int) -> list[CountedUpdate]:
    """The updates in the spool."""
    return [CountedUpdate(f"agent-{num:04d}", tag_of(num), num_examples=100 + num) for num in range(num_updates)]


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def copy(sources: Sequence[NDArray[np.float32]], target: NDArray[np.float32]) -> None:
    """What to compare with: as many bytes, only copied."""
    for source in sources:
        np.copyto(target, source)


def fold(ready: Round, num_threads: int, kernel: Kernel | None, *, stored: bool = False) -> None:
    """Fold the updates into a model that is given up: all of aggregation but digest and sync, unless it is `stored`."""
    weights = [1 / len(ready.updates)] * len(ready.updates)
    frames = [ready.spool.stored(update.agent_id, update.content_tag) for update in ready.updates]
    with ready.models.open(ready.base_digest) as base, ready.models.writer(base.layout, ()) as writer:
        strategy, framing = make_strategy("fedavg"), ready.framing
        state = ServerState(strategy, framing.num_elements, ready.models, None, 1)
        step = Step(1, len(frames), len(frames))
        Fold(base, ready.spool, frames, weights, strategy, framing, writer, state, step, kernel).run(num_threads)
        if stored:
            writer.commit()


def ways() -> dict[str, Kernel | None]:
    """The ways to aggregate that there are on this machine."""
    kernel = compiled()
    return {"NumPy": None} if kernel is None else {"NumPy": None, "numba": kernel}


def measure_speed(directory: Path, num_updates: int, num_elements: int, num_runs: int) -> None:
    """Print the speeds."""
    ready = prepare(directory, num_updates, num_elements)
    ready.spool.sync()
    sources = [np.full(num_elements, agent_num, np.float32) for agent_num in range(num_updates)]
    target = np.zeros(num_elements, np.float32)
    contenders: dict[str, Callable[[], object]] = {"np.copyto": lambda: copy(sources, target)}
    for way, kernel in ways().items():
        for stored, word in ((False, "folded"), (True, "stored")):
            for num_threads, threads in ((1, "1 thread"), (2, "2 threads")):
                contenders[f"{word}, {way}, {threads}"] = functools.partial(
                    fold, ready, num_threads, kernel, stored=stored
                )
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(num_runs):
        for name, work in contenders.items():
            times[name].append(seconds(work))
    used = "NumPy" if kernel_for(num_updates * num_elements) is None else "numba"
    print(
        f"{num_updates} updates of {num_elements:,} elements, {ready.size_bytes / 1e6:.0f} MB; medians of {num_runs}; "
        f"a coordinator takes {used} for them"
    )
    medians = {name: statistics.median(runs) for name, runs in times.items()}
    for name, median in medians.items():
        ratio = medians["np.copyto"] / median
        print(f"  {name:24} {median * 1000:7.1f} ms {ready.size_bytes / median / 1e9:6.2f} GB/s  ratio {ratio:.2f}")


def measure_memory(directory: Path) -> None:
    """Print the peaks, each from a process of its own that only aggregates."""
    largest = prepare(directory, max(COHORTS), MEMORY_ELEMENTS)
    size_mb = MEMORY_ELEMENTS * ELEMENT_BYTES / 1e6
    print(f"peak memory that aggregation adds, 2 threads, updates of {size_mb:.0f} MB")
    loading = ""
    for way in ways():
        for num_updates in COHORTS:
            arguments = [
                "--dir",
                str(directory),
                "--peak",
                str(num_updates),
                "--base",
                largest.base_digest,
                "--way",
                way,
            ]
            command = [sys.executable, __file__, *arguments]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            added_mb, loading = output.splitlines()
            print(f"  {num_updates:4} updates, {way}  {added_mb} MB")
    if "numba" in ways():
        print(f"loading numba, once: {loading}")


def peak(directory: Path, num_updates: int, base_digest: str, way: str) -> None:
    """Print how many MB the peak resident set grows by in one aggregation, and what was needed before it."""
    models = ModelStore(directory / "models")
    spool = Spool(directory / "spool").round(RUN, 1)
    ready = Round(models, base_digest, spool, counted(num_updates), plan_framing(MEMORY_ELEMENTS))
    at_start, started = resident_bytes("VmRSS"), time.perf_counter()
    kernel = compiled() if way == "numba" else None
    loading_s, before = time.perf_counter() - started, resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    fold(ready, 2, kernel, stored=True)
    print(f"{(resident_bytes('VmHWM') - before) / 1e6:6.1f}")
    print(f"{loading_s:.1f} s, {(before - at_start) / 1e6:.0f} MB")


def resident_bytes(field: str) -> int:
    """This process's resident set, now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=None, help="where to work: 1 GB is written and removed")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--elements", type=int, default=11_200_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(options.dir, options.peak, options.base, options.way)
        return
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        measure_speed(Path(directory), options.updates, options.elements, options.runs)
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        measure_memory(Path(directory))


if __name__ == "__main__":
    main()
