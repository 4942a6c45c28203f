"""What every strategy must hold to, as a check to run on yours.

In a test,

    from coordinator.strategies.conformance import check_strategy

    def test_my_strategy_conforms():
        check_strategy(Mine)

or from a shell, with options where it has some:

    python -m coordinator.strategies.conformance my_strategies:Mine limit=0.1

It aggregates made-up updates in a temporary directory with the coordinator's own code, in a second or so. The rules are the
functions below, in order; each says in its first line what must be true.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregate import Aggregated, AggregationError, CountedUpdate, aggregate
from coordinator.gates import delta_sum_squares
from coordinator.models import ModelStore
from coordinator.spool import RoundSpool
from coordinator.strategies.base import Cohort, Shares, Step, Strategy, StrategyError
from coordinator.strategies.registry import SETTINGS, make_strategy
from midge.wire.codecs import FLOAT32, encode_float32
from midge.wire.frames import Framing, content_tag, encode_frame, plan_framing, run_tag

Vector = NDArray[np.float32]
Make = Callable[[], Strategy]

_NUM_ELEMENTS = 100_003
"""Several blocks, and an odd end."""


class ConformanceError(AssertionError):
    """A strategy breaks rules; the message has a line for each."""


class _BrokenError(Exception):
    """One rule, and how it was broken."""


def check_strategy(make: Make) -> None:
    """Check that what `make` gives holds to all rules.

    Args:
        make: gives a new strategy at each call, always the same: its class, where it has no options that must be given.

    Raises:
        ConformanceError: it does not; the message says which rules it breaks, and how.
    """
    broken = [f"{_title(rule)} {problem}" for rule, problem in _problems(make) if problem]
    if broken:
        raise ConformanceError("\n".join([f"{make()!r} breaks {len(broken)} of {len(_RULES)} rules:", *broken]))


def _problems(make: Make) -> Iterator[tuple[Callable[[Make], None], str]]:
    for rule in _RULES:
        try:
            rule(make)
        except _BrokenError as error:
            yield rule, str(error)
        except Exception as error:  # noqa: BLE001  it is somebody's code, and may raise anything
            yield rule, f"It raised {type(error).__name__}: {error}"
        else:
            yield rule, ""


# The rules.


def _weighs(make: Make) -> None:
    """A weight is a finite number of at least 0, the same each time, and above 0 for some update."""
    numbers = (1, 10, 600, 2**53)
    weights, again = ([make().weight(number) for number in numbers] for _ in range(2))
    if weights != again or not np.isfinite(weights).all() or min(weights) < 0 or max(weights) <= 0:
        raise _BrokenError(f"Updates on {', '.join(map(str, numbers))} examples weigh {weights}, then {again}.")


def _stays(make: Make) -> None:
    """Where all agents return the global model and nothing is remembered yet, the model stays as it is, to the bit."""
    with _bench() as bench:
        made = bench.aggregate(make(), [bench.base] * 3)
        if made.digest != bench.base_digest:
            raise _BrokenError(f"It moved by {made.delta_norm:g} (L2 norm).")


def _moves_towards(make: Make) -> None:
    """Where all agents agree and nothing is remembered yet, no element moves away from what they agree on."""
    with _bench() as bench:
        agreed = _vectors(1, seed=5)[0]
        wanted = np.sign(agreed.astype(np.float64) - bench.base)
        moved = np.sign(bench.elements(bench.aggregate(make(), [agreed] * 3)).astype(np.float64) - bench.base)
        if num_away := int(np.count_nonzero(moved * wanted < 0)):
            raise _BrokenError(f"{num_away} of {_NUM_ELEMENTS} elements did: delta is local - global, to be added.")


def _is_elementwise(make: Make) -> None:
    """An element of the next model and of the state depends on no other element: blocks may be cut anywhere."""
    whole = _applied(make(), slice(None))
    for what, parts in (
        ("in two blocks", (slice(0, 40_001), slice(40_001, None))),
        ("backwards", (slice(None, None, -1),)),
    ):
        pieces = [_applied(make(), part) for part in parts]
        joined = [np.concatenate(arrays) for arrays in zip(*pieces, strict=True)]
        expected = [array[parts[0]] for array in whole] if len(parts) == 1 else whole
        for name, seen, wanted in zip(("the next model", *make().state_names), joined, expected, strict=True):
            if seen.tobytes() != wanted.tobytes():
                raise _BrokenError(f"Given {what}, {name} differs in {int((seen != wanted).sum())} elements.")
    if make().replaces_mean:
        rows = np.stack(_vectors(max(4, make().min_updates))).astype(np.float64)
        centre = make().centre(rows.copy())
        blocks = [make().centre(rows[:, part].copy()) for part in np.array_split(np.arange(_NUM_ELEMENTS), 9)]
        if np.concatenate(blocks).tobytes() != centre.tobytes():
            raise _BrokenError("Given in nine blocks, what stands in place of the mean differs.")


def _repeats(make: Make) -> None:
    """The same updates and the same state give the same bits: again, by another instance, with any number of threads."""
    with _bench() as bench:
        vectors = _vectors(4)
        strategy = make()
        first = bench.aggregate(strategy, vectors)
        for what, other, num_threads in (("again", strategy, 1), ("anew", make(), 1), ("by 3 threads", make(), 3)):
            if bench.aggregate(other, vectors, num_threads=num_threads) != first:
                raise _BrokenError(
                    f"Done {what}, it differs: what is remembered belongs into the state, not the object."
                )


def _ignores_order(make: Make) -> None:
    """The order in which updates arrive changes no bit."""
    with _bench() as bench:
        vectors = _vectors(4)
        if bench.aggregate(make(), vectors) != bench.aggregate(make(), vectors, backwards=True):
            raise _BrokenError("The last to arrive came first, and the result differs.")


def _ignores_scale(make: Make) -> None:
    """Weights count relative to each other: all of them 1024 times as large change no bit."""
    with _bench() as bench:
        vectors = _vectors(4)
        if bench.aggregate(make(), vectors) != bench.aggregate(_Heavier(make()), vectors):
            raise _BrokenError("The result differs.")


def _leaves_inputs(make: Make) -> None:
    """`apply` gives a new float32 array of the block's length, and leaves the global model alone."""
    before = _vectors(1, seed=1)[0]
    given = before.copy()
    given.flags.writeable = False
    state = _initial_state(make())
    made = make().apply(given, _vectors(1)[0].astype(np.float64), state, _STEP)
    if made.dtype != np.float32 or made.shape != before.shape:
        raise _BrokenError(f"It gives {made.dtype}{list(made.shape)} for a block of {len(before)}.")
    if any(np.shares_memory(made, other) for other in (given, *state)):
        raise _BrokenError("It gives a view of the global model or of the state.")


def _state_survives(make: Make) -> None:
    """Four rounds through the store give what four rounds in memory give: the state is all that is remembered."""
    strategy = make()
    names, initial = strategy.state_names, strategy.initial_state()
    if len(set(names)) != len(names) or len(initial) != len(names):
        raise _BrokenError(f"state_names are {names}, initial_state() is {initial}: expected one value for each name.")
    with _bench() as bench:
        vectors = _vectors(4)
        kept: str | None = None
        digest, memory, state = bench.base_digest, bench.base, _initial_state(strategy)
        for round_num, vector in enumerate(vectors, start=1):
            made = bench.aggregate(make(), [vector], base=digest, round_num=round_num, state=kept)
            digest, kept = made.digest, made.server_state
            step = Step(round_num, 1, 1)
            memory = strategy.apply(memory, vector.astype(np.float64), state, step)
            stored = [bench.elements(made), *(bench.state(kept, len(names)) if kept else ())]
            for name, seen, wanted in zip(("the model", *names), stored, (memory, *state), strict=True):
                if seen.tobytes() != wanted.tobytes():
                    raise _BrokenError(
                        f"In round {round_num}, {name} differs in {int((seen != wanted).sum())} elements."
                    )


def _stays_finite(make: Make) -> None:
    """Whatever finite numbers agents send, what is not finite is refused, and never stored nor anything else raised."""
    largest = np.full(_NUM_ELEMENTS, np.finfo(np.float32).max)
    far: list[list[Vector]] = [[largest, -largest], [largest] * 2, [-largest], [largest, _vectors(1)[0]]]
    for vectors in far:
        with _bench() as bench:
            try:
                made = bench.aggregate(make(), vectors)
            except AggregationError:
                if bench.models.digests() != {bench.base_digest}:
                    raise _BrokenError("A refused step left files.") from None
                continue
            if not np.isfinite(bench.elements(made)).all():
                raise _BrokenError("The next model is not finite.")


_RULES = (
    _weighs,
    _stays,
    _moves_towards,
    _is_elementwise,
    _repeats,
    _ignores_order,
    _ignores_scale,
    _leaves_inputs,
    _state_survives,
    _stays_finite,
)
_STEP = Step(1, 3, 30)


# A coordinator's aggregation, on made-up updates.


@dataclass(frozen=True)
class _Bench:
    directory: Path
    models: ModelStore
    base: Vector
    base_digest: str
    framing: Framing
    rounds: Iterator[int]

    def aggregate(
        self,
        strategy: Strategy,
        vectors: Sequence[Vector],
        *,
        base: str = "",
        round_num: int = 1,
        state: str | None = None,
        num_threads: int = 1,
        backwards: bool = False,
    ) -> Aggregated:
        """One round of agents that come to these vectors; the first with one example, the second with two, and so on.

        Where that are too few for the strategy, more agents come to the same ones.
        """
        spool = RoundSpool(self.directory / f"{next(self.rounds)}.spool")
        enough = itertools.islice(itertools.cycle(vectors), max(len(vectors), strategy.min_updates))
        arriving = list(enumerate(enough, start=1))
        try:
            with self.models.open(base or self.base_digest) as model:
                updates = [
                    self._receive(spool, number, vector, model.elements)
                    for number, vector in (arriving[::-1] if backwards else arriving)
                ]
                return aggregate(
                    model,
                    spool,
                    updates,
                    strategy,
                    self.framing,
                    self.models,
                    num_threads,
                    round_num=round_num,
                    server_state=state,
                )
        finally:
            spool.close()

    def _receive(self, spool: RoundSpool, number: int, vector: Vector, base: Vector) -> CountedUpdate:
        agent_id, tag = f"agent-{number:03}", content_tag(hashlib.sha256(vector.tobytes()).hexdigest())
        for index in range(self.framing.num_frames):
            start, stop = self.framing.span(index)
            frame = encode_frame(
                codec=FLOAT32,
                run_tag=run_tag("conformance"),
                round_num=1,
                index=index,
                num_elements=stop - start,
                content_tag=tag,
                body=encode_float32(vector[start:stop]),
            )
            spool.append(agent_id, frame, bytes(32), delta_sum_squares(vector[start:stop], base[start:stop]))
        return CountedUpdate(agent_id, tag, number)

    def elements(self, made: Aggregated) -> Vector:
        """The next model, float32[n]."""
        with self.models.open(made.digest) as model:
            return np.array(model.elements)

    def state(self, digest: str, num_vectors: int) -> list[Vector]:
        """What is remembered, float32[n] each."""
        with self.models.open(digest) as stored:
            return list(np.array(stored.elements).reshape(num_vectors, -1))


@contextmanager
def _bench() -> Iterator[_Bench]:
    with tempfile.TemporaryDirectory(prefix="midge-conformance-") as name:
        directory = Path(name)
        models = ModelStore(directory / "models")
        base = _vectors(1, seed=1)[0]
        digest = models.save_state({"w": base})
        yield _Bench(directory, models, base, digest, plan_framing(len(base)), itertools.count())


class _Heavier(Strategy):
    """Another strategy, whose weights are 1024 times as large: a power of two, so that no rounding differs."""

    def __init__(self, other: Strategy) -> None:
        self._other = other
        self.state_names = other.state_names  # type: ignore[misc]
        self.averages_statistics = other.averages_statistics  # type: ignore[misc]
        self.replaces_mean = other.replaces_mean  # type: ignore[misc]
        self.needs_distances = other.needs_distances  # type: ignore[misc]

    @property
    def min_updates(self) -> int:
        return self._other.min_updates

    def shares(self, cohort: Cohort) -> Shares:
        return self._other.shares(cohort)

    def centre(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return self._other.centre(rows)

    def weight(self, num_examples: int) -> float:
        return 1024.0 * self._other.weight(num_examples)

    def initial_state(self) -> tuple[float, ...]:
        return self._other.initial_state()

    def apply(self, *blocks: Any) -> Vector:
        return self._other.apply(*blocks)


def _vectors(number: int, *, seed: int = 7) -> list[Vector]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(_NUM_ELEMENTS).astype(np.float32) for _ in range(number)]


def _initial_state(strategy: Strategy) -> list[Vector]:
    return [np.full(_NUM_ELEMENTS, value, np.float32) for value in strategy.initial_state()]


def _applied(strategy: Strategy, part: slice) -> list[Vector]:
    """The next model's elements and the state's, from a state that is not the initial one."""
    base, mean = _vectors(2, seed=3)
    state = [np.abs(array[part]).astype(np.float32) for array in _vectors(len(strategy.state_names), seed=4)]
    return [strategy.apply(base[part].copy(), mean[part].astype(np.float64), state, _STEP), *state]


def _title(rule: Callable[[Make], None]) -> str:
    return f"- {(rule.__doc__ or '').strip()}"


def main(arguments: Sequence[str]) -> int:
    """Check the strategy that the first argument names, with the options that the others give as key=value."""
    if not arguments or arguments[0].startswith("-"):
        sys.stderr.write(
            "usage: python -m coordinator.strategies.conformance package.module:object [option=value ...]\n"
        )
        return 2
    try:
        name, options = arguments[0], _options(arguments[1:])
        settings: dict[str, Any] = {key: options.pop(key) for key in SETTINGS if key in options}

        def make() -> Strategy:
            return make_strategy(name, options, **settings)

        make()
    except (StrategyError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    num_broken = 0
    for rule, problem in _problems(make):
        num_broken += bool(problem)
        sys.stdout.write(
            f"{'BROKEN' if problem else 'ok    '} {_title(rule)[2:]}\n" + (f"       {problem}\n" if problem else "")
        )
    sys.stdout.write(
        f"{name}: {num_broken} of {len(_RULES)} rules are broken\n" if num_broken else f"{name} conforms\n"
    )
    return 1 if num_broken else 0


def _options(words: Sequence[str]) -> dict[str, bool | int | float | str]:
    options: dict[str, bool | int | float | str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r}: expected option=value")
        options[key] = _value(text)
    return options


def _value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
