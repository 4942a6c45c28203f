"""What is learned in the simulation: a small vector, by pure functions that anyone can evaluate again.

A model is a few float32 elements and one counter. Training adds to each element a number between -0.25 and 0.25 that
follows from (seed, round, agent); aggregation is the mean weighted by examples, in float64 and in agent order. So what
every version must be can be said without a broker: `chain` does.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from edge_agent.agent_events import FinishedUpdate
from midge.wire.codecs import FLOAT32, encode_float32
from midge.wire.frames import Framing, content_tag, encode_frame, run_tag, update_digest
from midge.wire.layout import Layout, TensorSpec, model_hash
from midge.wire.messages import Evaluation


@dataclass(frozen=True)
class Model:
    """A stored model, as the coordinator's driver wants one."""

    layout: Layout
    counters: tuple[int, ...]
    elements: NDArray[np.float32]

    @functools.cached_property
    def digest(self) -> str:
        """Names it."""
        hasher = model_hash(self.layout, self.counters)
        hasher.update(self.elements.astype("<f4").tobytes())
        return hasher.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def close(self) -> None:
        """Nothing is open."""

    def release(self) -> None:
        """Nothing is mapped."""


@dataclass(frozen=True)
class Trained:
    """What one agent has after training."""

    agent_id: str
    round_num: int
    base_digest: str
    num_examples: int
    counters: tuple[int, ...]
    elements: NDArray[np.float32]


@functools.cache
def layout_of(num_elements: int) -> Layout:
    """The layout of a model of so many elements."""
    return Layout((TensorSpec("weight", (num_elements,), "float32"), TensorSpec("steps", (), "int64")))


def noise(text: str, num_elements: int) -> NDArray[np.float32]:
    """Numbers between -0.25 and 0.25 that follow from `text`; exact in float32."""
    raw = hashlib.shake_256(text.encode()).digest(2 * num_elements)
    return np.frombuffer(raw, "<i2").astype(np.float32) / np.float32(2**17)


def initial_model(seed: int, num_elements: int) -> Model:
    """Version 0."""
    return Model(layout_of(num_elements), (0,), noise(f"initial/{seed}", num_elements))


def train(
    base_digest: str,
    elements: NDArray[np.float32],
    counters: tuple[int, ...],
    address: tuple[int, int, str],
    salt: str = "",
) -> Trained:
    """What agent `address[2]` makes of these elements, by (seed, round, agent); with a salt, something else."""
    seed, round_num, agent_id = address
    delta = noise(f"{seed}/{round_num}/{agent_id}{salt}", len(elements))
    num_examples = 1 + hashlib.sha256(f"{seed}/{agent_id}".encode()).digest()[0] % 50
    return Trained(agent_id, round_num, base_digest, num_examples, (counters[0] + num_examples,), elements + delta)


def average(base: Model, updates: Iterable[Trained]) -> Model:
    """The next version: the mean weighted by examples, in agent order."""
    ordered = sorted(updates, key=lambda update: update.agent_id)
    total = sum(update.num_examples for update in ordered)
    mean = np.zeros(len(base.elements), np.float64)
    for update in ordered:
        mean += update.elements.astype(np.float64) * (update.num_examples / total)
    return Model(base.layout, (max(update.counters[0] for update in ordered),), mean.astype(np.float32))


def chain(seed: int, num_elements: int, agent_ids: Iterable[str], rounds: int) -> list[str]:
    """The digests of versions 0 to `rounds` where all of these agents count in every round, and nothing else happens."""
    model = initial_model(seed, num_elements)
    digests, agents = [model.digest], list(agent_ids)
    for round_num in range(1, rounds + 1):
        base = model
        model = average(
            base, [train(base.digest, base.elements, base.counters, (seed, round_num, agent)) for agent in agents]
        )
        digests.append(model.digest)
    return digests


def evaluate(elements: NDArray[np.float32], num_examples: int) -> Evaluation:
    """Some score: how far the model is from zero."""
    loss = math.sqrt(float(np.sum(elements.astype(np.float64) ** 2)))
    return Evaluation(num_examples=num_examples, loss=loss, metrics={"accuracy": 1.0 / (1.0 + loss)})


def package(
    trained: Trained, layout: Layout, framing: Framing, run_id: str, score: Evaluation
) -> tuple[FinishedUpdate, list[bytes]]:
    """An update as it lies on an agent's disk: its header, and its frames as they are sent."""
    spans = [framing.span(index) for index in range(framing.num_frames)]
    bodies = [encode_float32(trained.elements[start:stop]) for start, stop in spans]
    digest = update_digest(hashlib.sha256(body).digest() for body in bodies)
    tag, run = content_tag(digest), run_tag(run_id)
    frames = [
        encode_frame(
            codec=FLOAT32,
            run_tag=run,
            round_num=trained.round_num,
            index=index,
            num_elements=stop - start,
            content_tag=tag,
            body=body,
        )
        for index, ((start, stop), body) in enumerate(zip(spans, bodies, strict=True))
    ]
    update = FinishedUpdate(
        run_id=run_id,
        round_num=trained.round_num,
        model_digest=trained.base_digest,
        layout_digest=layout.digest,
        update_digest=digest,
        num_frames=framing.num_frames,
        num_examples=trained.num_examples,
        counters=trained.counters,
        training_s=1.0,
        evaluation=score,
    )
    return update, frames
