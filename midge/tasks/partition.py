"""Partitions: which examples of a data set are whose. Indices in, indices out; NumPy alone.

Data on devices are skewed, and how far they are decides how federated learning goes, so an experiment must say it:

    iid             a random part, alike in all but size
    contiguous      the data cut in the order that they lie in: part i is the i-th of N pieces of a size
    shards:k        k shards of the data sorted by label, dealt at random: with k = 2 a part has about two labels
                    (McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data,
                    https://arxiv.org/abs/1602.05629)
    dirichlet:a     each label is cut in proportions drawn from Dir(a): skewed labels and sizes, more so for a small `a`
                    (Hsu et al. 2019, Measuring the Effects of Non-Identical Data Distribution for Federated Visual
                    Classification, https://arxiv.org/abs/1909.06335)
    quantity:a      sizes drawn from Dir(a), labels as in iid: some have much and others little, more so for a small `a`
                    (Li et al. 2022, Federated Learning on Non-IID Data Silos: An Experimental Study, NIID-Bench,
                    https://arxiv.org/abs/2102.02079)
    classes         an agent has most of its own labels and few of the others': `by_labels`

The parts of all but the last are disjoint and cover everything. `by_labels` looks at one agent alone, so two agents that
run it over the same data share examples; where they must not, give each a part as well (`select` applies both).

Every device deals for itself and takes its own part, so all must deal alike. A choice depends on nothing but the data,
the arguments and the seed, by way of `RandomState`, whose numbers NumPy has frozen for ever (NEP 19); those of
`default_rng` may change with its version.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Collection
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from midge.tasks.base import DataSpec, TaskError

Indices: TypeAlias = NDArray[np.int64]
Labels: TypeAlias = NDArray[Any]
"""int[num_examples]."""

MIN_EXAMPLES = 10
"""No part of `dirichlet` or `quantity` has fewer, as in NIID-Bench (https://arxiv.org/abs/2102.02079)."""

_MAX_DRAWS = 1000
_EXAMPLE_OF = {
    "iid": "iid",
    "contiguous": "contiguous",
    "shards": "shards:2",
    "dirichlet": "dirichlet:0.3",
    "quantity": "quantity:0.5",
}


def by_labels(labels: Labels, classes: Collection[int], sel_prob: float, def_prob: float, seed: int) -> Indices:
    """Keep `sel_prob` of the examples of each label in `classes`, and `def_prob` of those of each other label.

    Counts are exact, not left to chance: of n examples of a label, p·n are kept, rounded to the nearest, halves up.
    Which ones depends on the seed and the label alone: with the same seed a larger share contains the smaller.

    Args:
        labels: of the examples.
        classes: the labels owned; empty for all.
        sel_prob: 0 to 1.
        def_prob: 0 to 1.
        seed: of the choice.

    Returns:
        The indices kept, in ascending order; possibly none.
    """
    for name, prob in (("sel_prob", sel_prob), ("def_prob", def_prob)):
        if not 0 <= prob <= 1:
            raise TaskError(f"{name} is {prob}: expected a share from 0 to 1")
    kept = [np.empty(0, np.int64)]
    for label in np.unique(labels):
        prob = sel_prob if not classes or label in classes else def_prob
        indices = np.flatnonzero(labels == label)
        num_kept = math.floor(prob * len(indices) + 0.5)
        kept.append(_random(seed, f"label {label}").permutation(indices)[:num_kept])
    return np.sort(np.concatenate(kept))


def iid(num_examples: int, num_parts: int, seed: int) -> list[Indices]:
    """Deal shuffled examples into `num_parts` parts, whose sizes differ by one at most."""
    _check_enough(num_examples, num_parts, "parts")
    dealt = np.array_split(_random(seed, "iid").permutation(num_examples), num_parts)
    return [np.sort(part) for part in dealt]


def contiguous(num_examples: int, num_parts: int) -> list[Indices]:
    """Cut the examples, in the order they have, into `num_parts` pieces, whose sizes differ by one at most."""
    _check_enough(num_examples, num_parts, "parts")
    return np.array_split(np.arange(num_examples), num_parts)


def shards(labels: Labels, shards_per_part: int, num_parts: int, seed: int) -> list[Indices]:
    """Sort by label, cut into `shards_per_part` · `num_parts` shards of a size, and deal these at random."""
    num_shards = shards_per_part * num_parts
    _check_enough(len(labels), num_shards, "shards")
    random = _random(seed, "shards")
    shuffled = random.permutation(len(labels))
    pieces = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], num_shards)
    dealt = random.permutation(num_shards).reshape(num_parts, shards_per_part)
    return [np.sort(np.concatenate([pieces[shard] for shard in hand])) for hand in dealt]


def dirichlet(labels: Labels, alpha: float, num_parts: int, seed: int) -> list[Indices]:
    """Cut the examples of each label into `num_parts`, in proportions drawn from Dir(alpha).

    It is drawn again until each part has `MIN_EXAMPLES` (or half of an even share, where the data are so few).

    Raises:
        TaskError: 1000 draws gave no such cut: alpha is too small for so many parts.
    """
    _check_enough(len(labels), num_parts, "parts")
    least = _least(len(labels), num_parts)
    random = _random(seed, "dirichlet")
    by_label = [random.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    sizes = np.array([[len(indices)] for indices in by_label])
    for _ in range(_MAX_DRAWS):
        shares = random.dirichlet(np.full(num_parts, alpha), size=len(by_label))
        if not np.isfinite(shares).all():
            continue  # a tiny alpha: every share of a label was rounded to 0
        cuts = np.rint(np.cumsum(shares, axis=1)[:, :-1] * sizes).astype(np.int64)
        counts = np.diff(cuts, axis=1, prepend=0, append=sizes).sum(axis=0)
        if counts.min() >= least:
            pieces = [np.split(indices, cut) for indices, cut in zip(by_label, cuts, strict=True)]
            return [np.sort(np.concatenate(part)) for part in zip(*pieces, strict=True)]
    raise TaskError(_no_cut("dirichlet", alpha, len(labels), num_parts))


def quantity(num_examples: int, alpha: float, num_parts: int, seed: int) -> list[Indices]:
    """Deal shuffled examples into `num_parts` parts, whose shares of the whole are drawn from Dir(alpha).

    It is drawn again until each part has `MIN_EXAMPLES` (or half of an even share, where the data are so few).

    Raises:
        TaskError: 1000 draws gave no such cut: alpha is too small for so many parts.
    """
    _check_enough(num_examples, num_parts, "parts")
    random = _random(seed, "quantity")
    shuffled = random.permutation(num_examples)
    for _ in range(_MAX_DRAWS):
        shares = random.dirichlet(np.full(num_parts, alpha))
        if not np.isfinite(shares).all():
            continue  # a tiny alpha: every share was rounded to 0
        cuts = np.rint(np.cumsum(shares)[:-1] * num_examples).astype(np.int64)
        if np.diff(cuts, prepend=0, append=num_examples).min() >= _least(num_examples, num_parts):
            return [np.sort(part) for part in np.split(shuffled, cuts)]
    raise TaskError(_no_cut("quantity", alpha, num_examples, num_parts))


def _least(num_examples: int, num_parts: int) -> int:
    """The fewest examples that a drawn part may have."""
    return max(1, min(MIN_EXAMPLES, num_examples // num_parts // 2))


def _no_cut(name: str, alpha: float, num_examples: int, num_parts: int) -> str:
    return (
        f"{name}:{alpha:g} over {num_examples} examples: none of {_MAX_DRAWS} draws gave each of {num_parts} parts "
        f"at least {_least(num_examples, num_parts)} examples; use a larger alpha or fewer parts"
    )


def partition(labels: Labels, how: str, num_parts: int, seed: int) -> list[Indices]:
    """All parts of the data, dealt as `how` says: "iid", "contiguous", "shards:2", "dirichlet:0.3" or "quantity:0.5".

    Returns:
        For each part its indices into `labels`, in ascending order; together every index once.

    Raises:
        TaskError: `how` is none of these, or the data cannot be dealt so.
    """
    name, _, argument = how.partition(":")
    number = _positive(argument)
    match name:
        case "iid" if not argument:
            return iid(len(labels), num_parts, seed)
        case "contiguous" if not argument:
            return contiguous(len(labels), num_parts)
        case "shards" if argument.isascii() and argument.isdecimal() and number:
            return shards(labels, int(argument), num_parts, seed)
        case "dirichlet" if number:
            return dirichlet(labels, number, num_parts, seed)
        case "quantity" if number:
            return quantity(len(labels), number, num_parts, seed)
        case _:
            raise TaskError(f"partition {how!r}: expected {_one_of_the_partitions()}{_did_you_mean(name, argument)}")


def select(labels: Labels, spec: DataSpec) -> Indices:
    """The examples that `spec` gives its agent: its part, if there are parts, then of that what `by_labels` keeps.

    Args:
        labels: of all examples, in the order that every device has them in.
        spec: what the agent was started with.

    Returns:
        Indices into `labels`, in ascending order, at least one.

    Raises:
        TaskError: `spec` makes no sense for these labels, or leaves nothing.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise TaskError(f"labels of shape {labels.shape} and type {labels.dtype}: expected one integer an example")
    known = [int(label) for label in np.unique(labels)]
    strangers = sorted(set(spec.classes) - set(known))
    if strangers:
        shown = f"{known[0]} to {known[-1]}" if known == list(range(len(known))) and known else str(known[:20])
        raise TaskError(f"classes {spec.classes}: no example is labelled {strangers[0]}; the labels are {shown}")
    part = _part(labels, spec)
    kept = part[by_labels(labels[part], spec.classes, spec.sel_prob, spec.def_prob, spec.seed)]
    if not len(kept):
        raise TaskError(
            f"no example is left of {len(labels)}, {len(part)} of them in this part: classes {spec.classes or 'all'}, "
            f"sel_prob {spec.sel_prob}, def_prob {spec.def_prob}, partition {spec.partition or 'none'}, part {spec.part} "
            f"of {spec.num_parts}. Give the agent more classes or larger shares."
        )
    return kept


def _part(labels: Labels, spec: DataSpec) -> Indices:
    if not 0 <= spec.part < spec.num_parts:
        raise TaskError(f"part {spec.part} of {spec.num_parts} parts: expected 0 to num_parts - 1")
    if not spec.partition:
        if spec.num_parts > 1:
            raise TaskError(
                f"part {spec.part} of {spec.num_parts}, but no partition: say how to deal, {_one_of_the_partitions()}"
            )
        return np.arange(len(labels))
    return partition(labels, spec.partition, spec.num_parts, spec.seed)[spec.part]


def _positive(text: str) -> float:
    """The number in `text`; 0 where there is none, or none above 0."""
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if 0 < number < math.inf else 0.0


def _one_of_the_partitions() -> str:
    *others, last = _EXAMPLE_OF.values()
    return f"{', '.join(others)} or {last}"


def _did_you_mean(name: str, argument: str) -> str:
    nearest = difflib.get_close_matches(name.strip().lower(), _EXAMPLE_OF, n=1)
    if not nearest:
        return ""
    example = _EXAMPLE_OF[nearest[0]]
    keep_argument = name != nearest[0] and ":" in example and _positive(argument)  # only the name was wrong
    return f"; did you mean {nearest[0]}:{argument}?" if keep_argument else f"; did you mean {example}?"


def _check_enough(num_examples: int, num_pieces: int, kind: str) -> None:
    if not 1 <= num_pieces <= num_examples:
        raise TaskError(f"{num_pieces} {kind} of {num_examples} examples: expected 1 to {num_examples}")


def _random(seed: int, purpose: str) -> np.random.RandomState:
    """Random numbers of their own for each purpose, so that one choice never shifts another."""
    digest = hashlib.sha256(f"midge partition, {purpose}, {seed}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, "<u4").astype(np.uint32))
