"""A comparison as one page of HTML that needs nothing else: no script, no font, no picture from anywhere. For a colleague."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import msgspec

from coordinator.experiment.compare_curves import curves, legend
from coordinator.experiment.compare_plan import CENTRALIZED, FEDERATED, FEDSGD
from coordinator.experiment.compare_style import styles_of
from coordinator.experiment.compare_summary import Comparison, Stat, headline, shown
from coordinator.experiment.compare_tables import is_short, steps_of_arm
from coordinator.experiment.scores import Held

_HEAT = "11, 110, 153"
_DARK_TEXT_BELOW = 0.62
"""Cells of the heat map with more of the colour than this have white text."""


_WHOLE_PASSES = (
    "as many steps as the agents made together, or up to one pass fewer, since the task knows only whole passes"
)


def page(comparison: Comparison) -> str:
    """The whole page."""
    many = f"{len(comparison.agents)} agent{'s' if len(comparison.agents) > 1 else ''}"
    title = f"{comparison.task}: what federating buys {many}"
    sections = [
        _arms(comparison),
        _curves(comparison),
        _labels(comparison),
        _agents(comparison),
        _budget(comparison),
        _configuration(comparison),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{_style(comparison)}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="lead">{escape(headline(comparison))}</p>
<p class="quiet">{_facts(comparison)}</p>
{"".join(sections)}
</main>
</body>
</html>
"""


def _facts(comparison: Comparison) -> str:
    num_seeds = len(comparison.seeds)
    seeds = f"{num_seeds} seeds ({_seeds(comparison)})" if num_seeds > 1 else f"one seed ({_seeds(comparison)})"
    spread = " Numbers are means over the seeds ± one standard deviation." if num_seeds > 1 else ""
    version = comparison.versions.get("midge", "")
    return escape(f"{seeds}, {comparison.rounds} rounds, {_date(comparison)}, Midge {version}.{spread}")


def _seeds(comparison: Comparison) -> str:
    first, last = comparison.seeds[0], comparison.seeds[-1]
    return str(first) if first == last else f"{first} to {last}"


def _date(comparison: Comparison) -> str:
    return comparison.finished_at[:16].replace("T", " ") + " UTC"


def _arms(comparison: Comparison) -> str:
    is_accuracy = comparison.metric == "accuracy"
    headings = ["way of learning", *(["accuracy"] if is_accuracy else []), "loss", "rounds", "gradient steps"]
    headings += ["examples a step", "passes", "seconds"]
    rows = []
    for place, arm in enumerate(comparison.arms):
        name = f'<span class="dot arm{place}"></span>{escape(arm.label)}'
        scores = [f"<b>{shown(arm.accuracy, 'accuracy')}</b>"] if is_accuracy else []
        cells = [*scores, shown(arm.loss, "loss"), f"{arm.rounds:,}", steps_of_arm(arm), arm.batch]
        cells += [f"{arm.passes:,.0f}", f"{arm.seconds:.1f}"]
        rows.append((name, cells))
    caption = (
        f"The last model of each, on the same test data, of {comparison.test.num_examples:,} examples. "
        "Passes: how often each example was looked at"
    )
    return f"<section><h2>Results</h2>{_table(caption, headings, rows)}</section>"


def _curves(comparison: Comparison) -> str:
    drawn = curves(comparison, comparison.metric)
    if not drawn:
        return ""
    band = " The band is one standard deviation over the seeds." if len(comparison.seeds) > 1 else ""
    words = f"{comparison.metric.capitalize()} on the test data, as the budget is used up.{band}"
    return (
        f"<section><h2>Round by round</h2>{legend(comparison)}<figure>"
        f'<div class="wide" role="region" aria-label="{escape(words)}" tabindex="0">{drawn}</div>'
        f"<figcaption>{escape(words)}</figcaption></figure></section>"
    )


def _labels(comparison: Comparison) -> str:
    arms = [(place, arm) for place, arm in enumerate(comparison.arms) if arm.by_label]
    if not arms:
        return ""
    labels = comparison.labels
    rows = []
    for place, arm in arms:
        name = f'<span class="dot arm{place}"></span>{escape(arm.label)}'
        rows.append((name, [_heat(arm.by_label.get(label)) for label in labels]))
    caption = "Accuracy on the test examples with each label, per cent, after the last round"
    return f"<section><h2>By label</h2>{_table(caption, ['', *labels], rows, 'heat')}</section>"


def _heat(found: Stat | None) -> str:
    if found is None:
        return ""
    strength = found.mean**2 * 0.9
    light = " class=over" if strength > _DARK_TEXT_BELOW else ""
    return f'<span{light} style="background: rgba({_HEAT}, {strength:.2f})">{found.mean * 100:.0f}</span>'


def _agents(comparison: Comparison) -> str:
    federated = next((arm for arm in comparison.arms if arm.arm == FEDERATED), None)
    central = next((arm for arm in comparison.arms if arm.arm == CENTRALIZED), None)
    has_alone = any(agent.alone for agent in comparison.agents)
    has_labels = any(agent.held.by_label for agent in comparison.agents)
    headings = ["agent", "holds", "examples", *(["of each label"] if has_labels else [])]
    headings += ["its own model, on the test data"] if has_alone else []
    headings += ["federated model, on its data"] if federated else []
    headings += ["centralised model, on its data"] if central else []
    rows = []
    for agent in comparison.agents:
        cells = [escape(agent.words), f"{agent.held.num_examples:,}"]
        cells += [_histogram(agent.held, comparison)] if has_labels else []
        cells += [shown(agent.alone, comparison.metric)] if has_alone else []
        cells += [shown(arm.by_agent.get(agent.agent_id), comparison.metric) for arm in (federated, central) if arm]
        rows.append((escape(agent.agent_id), cells))
    caption = f"What each agent holds, and {comparison.metric} agent by agent. Its data are those that it trains on"
    return f"<section><h2>By agent</h2>{_table(caption, headings, rows, 'words')}</section>"


def _histogram(held: Held, comparison: Comparison) -> str:
    """Bars, one a label, as high as the agent has examples of it, against the most that any agent has of any."""
    labels = comparison.labels or sorted(held.by_label, key=int)
    most = max((count for agent in comparison.agents for count in agent.held.by_label.values()), default=1)
    bars = []
    for place, label in enumerate(labels):
        count = held.by_label.get(label, 0)
        height = 22 * count / most
        bars.append(f'<rect x="{place * 9}" y="{24 - height:.1f}" width="7" height="{height:.1f}"/>')
    words = ", ".join(f"{label}: {held.by_label.get(label, 0)}" for label in labels)
    width = max(9 * len(labels), 9)
    return (
        f'<svg class="bars" width="{width}" height="26" viewBox="0 0 {width} 26" role="img" '
        f'aria-label="Examples by label: {escape(words)}"><title>{escape(words)}</title>{"".join(bars)}'
        f'<line x1="0" x2="{width - 2}" y1="24.5" y2="24.5"/></svg>'
    )


def _budget(comparison: Comparison) -> str:
    steps = ", ".join(f"{agent.agent_id} {agent.steps_a_round:,}" for agent in comparison.agents)
    epochs = comparison.definition["local_epochs"]
    batch = comparison.definition["batch_size"]
    size = f"in batches of {batch}" if batch else "all at once"
    passes = f"{epochs} pass{'es' if epochs > 1 else ''}"
    drawn = comparison.agents_a_round
    who = (
        "Every agent takes part in every round"
        if drawn == len(comparison.agents)
        else f"{drawn} agents are drawn a round"
    )
    lines = [
        (
            f"A gradient step is one batch. In a round, an agent makes {passes} over its own examples, {size}: as many steps "
            f"as it takes batches, {steps}. {who}, for {comparison.rounds:,} rounds: {comparison.budget:,} steps in all."
        ),
        (
            "An agent alone makes the steps that it makes when it is in every round: the same data, the same seeds, nobody "
            "else. Nothing else differs."
        ),
    ]
    arms = {arm.arm for arm in comparison.arms}
    if CENTRALIZED in arms:
        how = "exactly as many steps as the agents made together" if comparison.counts_steps else _WHOLE_PASSES
        lines.append(
            f"All data in one place: {how}, round by round, but one after the other, each from the last. No federation can "
            "make them so; it is what one could hope for at best."
        )
    fedsgd = next((arm for arm in comparison.arms if arm.arm == FEDSGD), None)
    if fedsgd is not None:
        bound = ", if it were not bounded by fedsgd_rounds" if is_short(fedsgd) else ""
        lines.append(
            "FedSGD: one step an agent and round, over all examples of the agent; as many rounds as make the same number of "
            f"steps{bound}. It made {fedsgd.rounds:,} rounds and {fedsgd.num_steps:,.0f} of {fedsgd.budget:,} steps. Each of "
            f"its steps looks at more examples, so it made {fedsgd.passes:,.0f} passes over them; and each of its rounds sends "
            "as much as one of the federation."
        )
    return (
        "<section><h2>The same budget for all</h2>" + "".join(f"<p>{escape(line)}</p>" for line in lines) + "</section>"
    )


def _configuration(comparison: Comparison) -> str:
    shown_elsewhere = {"agents"}
    rows = [
        (f"<code>{escape(key)}</code>", [f"<code>{escape(_text(value))}</code>"])
        for key, value in comparison.definition.items()
        if key not in shown_elsewhere and value not in ({}, "", None)
    ]
    rows += [
        (f"<code>{escape(agent_id)}</code>", [f"<code>{escape(_text(held))}</code>"])
        for agent_id, held in comparison.definition["agents"].items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    broker = f"MQTT over {comparison.broker}." if comparison.broker else ""
    facts = f"Seeds {', '.join(map(str, comparison.seeds))}. {versions}. {broker} {_date(comparison)}."
    central = f"{comparison.central.num_examples:,} in one place, " if comparison.central else ""
    data = f"Examples: {central}{comparison.test.num_examples:,} to test on."
    return (
        f"<section><h2>Configuration</h2><p>{escape(facts)} {escape(data)}</p>"
        f"{_table('What the results depend on', ['setting', 'value'], rows, 'words')}</section>"
    )


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {_text(one)}" for key, one in value.items()) or "all data"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _table(caption: str, headings: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], kind: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>' for name, cells in rows
    )
    return (
        f'<div class="wide" role="region" aria-label="{escape(caption)}" tabindex="0"><table class="{kind}">'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _style(comparison: Comparison) -> str:
    styles = styles_of([arm.arm for arm in comparison.arms])
    light = " ".join(f"--arm{place}: {style.light};" for place, style in enumerate(styles.values()))
    dark = " ".join(f"--arm{place}: {style.dark};" for place, style in enumerate(styles.values()))
    arms = "\n".join(
        f".line.arm{place} {{ stroke: var(--arm{place}); }} .band.arm{place} {{ fill: var(--arm{place}); }} "
        f".dot.arm{place} {{ background: var(--arm{place}); }}"
        for place in range(len(styles))
    )
    return _CSS.replace("/*light*/", light).replace("/*dark*/", dark).replace("/*arms*/", arms)


_CSS = """
:root { --paper: #ffffff; --ink: #1d2226; --quiet: #59636b; --rule: #e1e5e8; --wash: #f5f7f8; /*light*/ }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181b; --ink: #e6eaed; --quiet: #9aa6ae; --rule: #2d353a; --wash: #1b2125; /*dark*/ }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .7rem; }
p { margin: .5rem 0; max-width: 46rem; }
.lead { font-size: 1.15rem; }
.quiet, caption, figcaption { color: var(--quiet); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; }
th, td { padding: .42rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: middle; }
th:first-child, .words td, .words th { text-align: left; }
th { font-weight: 600; }
thead th { color: var(--quiet); font-size: .85rem; vertical-align: bottom; }
tbody th { font-weight: 500; white-space: nowrap; }
td { white-space: nowrap; }
.words td { white-space: normal; }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
.heat td { padding: 2px; border: 0; text-align: center; }
.heat thead th { text-align: center; }
.heat tbody th { border: 0; }
.heat td span { display: block; padding: .4rem .3rem; border-radius: 3px; min-width: 2.4rem; }
.heat .over { color: #ffffff; }
figure { margin: .4rem 0 0; }
figure svg { width: 100%; min-width: 40rem; height: auto; display: block; } /* narrower, its labels are too small: scroll */
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: 0; padding: 0; font-size: .92rem; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.band { opacity: .16; }
.grid { stroke: var(--rule); }
.tick { fill: var(--quiet); font-size: 12px; }
.bars rect { fill: var(--quiet); } .bars line { stroke: var(--rule); }
/*arms*/
@media print {
  :root { --paper: #ffffff; --ink: #000000; --quiet: #444444; --rule: #cccccc; /*light*/ }
  body { font-size: 11pt; } main { max-width: none; padding: 0; }
  section, figure, tr { break-inside: avoid; }
  .wide { overflow: visible; } figure svg { min-width: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
