"""The command `coordinator`.

Exit codes: 0 done, 1 the run failed, 2 wrong use or configuration.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from midge import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="coordinator")
def main() -> None:
    """Train one model on many devices that keep their data, over an MQTT broker."""


def _settings_options(command: Any) -> Any:
    options = [
        click.argument("config", required=False, type=click.Path(path_type=Path), envvar="MIDGE_CONFIG"),
        click.option("--broker", metavar="URL", help="mqtt://, mqtts://, ws:// or wss://, host and port."),
        click.option("--federation", metavar="NAME", help="Which federation this is."),
        click.option("--task", metavar="TASK", help="What is learned: a name, package.module:object or my_task.py."),
        click.option("--rounds", type=int, metavar="N", help="How many rounds."),
        click.option("--min-agents", type=int, metavar="N", help="How many agents to wait for."),
        click.option("--seed", type=int, metavar="N", help="Of every random choice."),
        click.option("--state-dir", metavar="DIR", help="Where everything is kept [default: midge-state]."),
        click.option("--data-dir", metavar="DIR", help="Where the data lie that versions are evaluated on."),
        click.option("--download", is_flag=True, default=None, help="Let the task fetch those that are not there."),
        click.option("--http-port", type=int, metavar="PORT", help="Of metrics, health and API; 0: any free one."),
        click.option("--username", metavar="NAME", help="User name at the broker."),
        click.option("--password-file", metavar="FILE", help="File whose first line is the password."),
        click.option("--ca-file", metavar="FILE", help="Certificates that the broker's must be signed by."),
        click.option("--cert-file", metavar="FILE", help="The coordinator's certificate."),
        click.option("--key-file", metavar="FILE", help="Its private key."),
        click.option("--tensorboard", "tensorboard_dir", metavar="DIR", help="Write TensorBoard's event files there."),
        click.option("--mlflow", "mlflow_uri", metavar="URI", help="Tell this MLflow server or database of the run."),
        click.option("--log-format", type=click.Choice(["human", "json"]), help="How log lines look."),
        click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="What is logged."),
        click.option(
            "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting; wins over all else."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@_settings_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and no progress.")
def run(config: Path | None, assignments: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Wait for agents, run the rounds, and exit. CONFIG is a TOML or JSON file.

    \b
    Examples:
      coordinator run --broker mqtt://localhost:1883 --task digits --rounds 20 --min-agents 3
      coordinator run experiment.toml --set learning_rate=0.05 --set cohort=5

    Started again with the same state directory and configuration, it goes on with the unfinished run.
    """
    from coordinator import commands  # noqa: PLC0415  help needs none of it

    sys.exit(commands.run(config, assignments, options, as_json=as_json))


@main.command(short_help="Stay up and serve metrics, health and the API.")
@_settings_options
@click.option(
    "--run", "run_config", type=click.Path(path_type=Path), help="Start, or go on with, the run of this file."
)
def serve(config: Path | None, assignments: tuple[str, ...], run_config: Path | None, **options: Any) -> None:
    """Stay up and serve metrics, health and the API; with --run, start that run.

    CONFIG is a TOML or JSON file of settings, as --run takes one that also defines a run. An unfinished run goes on; a run
    that is done is shown, and not begun again.

    \b
    Examples:
      coordinator serve --broker mqtt://mosquitto:1883 --run experiment.toml --set http_host=0.0.0.0
    """
    from coordinator import commands  # noqa: PLC0415

    sys.exit(commands.serve(config, assignments, options, run_config))


def _looking(command: Any) -> Any:
    options = [
        click.option(
            "--state-dir",
            default="midge-state",
            show_default=True,
            envvar="MIDGE_STATE_DIR",
            type=click.Path(path_type=Path),
            help="Of the coordinator; it may be running.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command(short_help="What the coordinator does, what is missing, until when.")
@_looking
def status(state_dir: Path, as_json: bool) -> None:
    """What the coordinator is doing, what is missing, and until when.

    \b
    Examples:
      coordinator status --state-dir midge-state
    """
    from coordinator import commands  # noqa: PLC0415

    sys.exit(commands.status(state_dir, as_json=as_json))


@main.command(short_help="Follow a running coordinator live.")
@_looking
@click.option("--url", metavar="URL", help="Of a coordinator elsewhere, as http://server:8080; instead of --state-dir.")
@click.option("--once", is_flag=True, help="Show how things are now, and exit.")
def watch(state_dir: Path, as_json: bool, url: str | None, once: bool) -> None:
    """Follow a running coordinator live: run, round, agents, and how well the model does on each agent's data, by round.

    Waits for a coordinator that is not there yet, and ends with the run. Exit codes: 0 the run is done or was stopped, 1 it
    failed, 2 wrong use (with --once: no coordinator answers too), 130 Ctrl-C. With --json, each change is one line of JSON.

    \b
    Examples:
      coordinator watch --state-dir midge-state
      coordinator watch --url http://server:8080
      coordinator watch --once --json
    """
    from coordinator import watch as watching  # noqa: PLC0415

    sys.exit(watching.watch(state_dir, url, once=once, as_json=as_json))


@main.command()
@_looking
def agents(state_dir: Path, as_json: bool) -> None:
    """The agents that were heard of.

    \b
    Examples:
      coordinator agents --json
    """
    from coordinator import commands  # noqa: PLC0415

    sys.exit(commands.agents(state_dir, as_json=as_json))


@main.group(invoke_without_command=True, short_help="All runs of a state directory, the latest first.")
@_looking
@click.pass_context
def runs(context: click.Context, state_dir: Path, as_json: bool) -> None:
    """All runs of a state directory, the latest first; works with and without a running coordinator. Or, with a command, one.

    \b
    Examples:
      coordinator runs --state-dir midge-state --json
      coordinator runs forget digits-3f9a1c
    """
    if context.invoked_subcommand is not None:
        return
    from coordinator import commands  # noqa: PLC0415

    sys.exit(commands.runs(state_dir, as_json=as_json))


@runs.command("forget", short_help="Remove a run, and the models that are its alone.")
@click.argument("run_id", metavar="RUN")
@_looking
def forget_run(run_id: str, state_dir: Path, as_json: bool) -> None:
    """Remove a run for good: its history, the models that are its alone, its updates and its agents' models.

    What another run or a base model needs stays. No coordinator may be running in the directory: stop it first; what it was
    doing goes on when it is started again.

    \b
    Examples:
      coordinator runs forget digits-3f9a1c --state-dir midge-state
    """
    from coordinator.upkeep import commands  # noqa: PLC0415

    sys.exit(commands.forget(state_dir, run_id, as_json=as_json))


@main.group(invoke_without_command=True, short_help="The versions of a run's model; base models.")
@_looking
@click.option("--run", "run_id", metavar="RUN", help="Of this run [default: the latest].")
@click.pass_context
def models(context: click.Context, state_dir: Path, as_json: bool, run_id: str | None) -> None:
    """The versions of a run's model: round, digest, scores, and whether the file is kept; or, with a command, base models.

    \b
    Examples:
      coordinator models --run digits-3f9a1c
      coordinator models push my-base --from weights.safetensors
    """
    if context.invoked_subcommand is not None:
        return
    from coordinator import commands  # noqa: PLC0415

    sys.exit(commands.models(state_dir, run_id, as_json=as_json))


@models.command("push", short_help="Register a base model.")
@click.argument("name")
@click.option("--task", default="digits", show_default=True, metavar="TASK", help="Whose model it is, as for `run`.")
@click.option(
    "--from", "file", type=click.Path(path_type=Path), metavar="FILE", help="A safetensors file of its weights."
)
@click.option(
    "--seed", type=click.IntRange(0, 2**53), default=0, show_default=True, help="Of the task's initial weights."
)
@_looking
def push_model(name: str, task: str, file: Path | None, seed: int, state_dir: Path, as_json: bool) -> None:
    """Register a base model under NAME: a task's model with its initial weights, or with those of a safetensors file.

    The file's tensors are matched by name, and must have the shapes and types of the task's; save it with
    `safetensors.torch.save_file(model.state_dict(), FILE)`. A run begins from it with `base_model = "NAME"`.

    \b
    Examples:
      coordinator models push my-base --task digits --seed 7
      coordinator models push my-base --from weights.safetensors
    """
    from coordinator import commands  # noqa: PLC0415

    sys.exit(commands.push_model(name, task, file, seed, state_dir, as_json=as_json))


@models.command("bases")
@_looking
def list_base_models(state_dir: Path, as_json: bool) -> None:
    """The base models that are registered.

    \b
    Examples:
      coordinator models bases --json
    """
    from coordinator import commands  # noqa: PLC0415

    sys.exit(commands.list_base_models(state_dir, as_json=as_json))


@models.command("remove", short_help="Give up a base model's name.")
@click.argument("name")
@click.option(
    "--state-dir",
    default="midge-state",
    show_default=True,
    envvar="MIDGE_STATE_DIR",
    type=click.Path(path_type=Path),
    help="Of the coordinator; it may be running.",
)
def remove_model(name: str, state_dir: Path) -> None:
    """Give up a base model's name, and its file where no run's version is the same model.

    \b
    Examples:
      coordinator models remove my-base
    """
    from coordinator import commands  # noqa: PLC0415

    sys.exit(commands.remove_model(name, state_dir))


@main.group("round")
def round_group() -> None:
    """What an operator may do to the round that is under way.

    \b
    Examples:
      coordinator round close
    """


@round_group.command("close", short_help="Close the current round with what has come.")
@_looking
def close_round(state_dir: Path, as_json: bool) -> None:
    """Close the current round with what has come: its updates are averaged, and who still works is told to stop.

    Below the quorum there is nothing to average: the attempt is abandoned, and the round tried again. Exit codes: 0 the round
    is closed, 1 it was abandoned or none was open, 2 no coordinator answers.

    \b
    Examples:
      coordinator round close --state-dir midge-state
    """
    from coordinator import commands  # noqa: PLC0415

    sys.exit(commands.close_round(state_dir, as_json=as_json))


@main.command(short_help="Write a model as a safetensors file.")
@click.argument("run_id", metavar="RUN")
@click.option(
    "--which", default="best", show_default=True, metavar="best|latest|N", help="Which version; N is a round."
)
@click.option(
    "--agent",
    "agent_id",
    metavar="ID",
    help="This agent's last accepted model, where they are kept (keep_agent_models).",
)
@click.option("--to", "path", required=True, type=click.Path(path_type=Path), help="The safetensors file to write.")
@click.option(
    "--state-dir",
    default="midge-state",
    show_default=True,
    envvar="MIDGE_STATE_DIR",
    type=click.Path(path_type=Path),
    help="Of the coordinator.",
)
def export(run_id: str, which: str, agent_id: str | None, path: Path, state_dir: Path) -> None:
    """Write a model as a safetensors file that `load_state_dict(strict=True)` takes. RUN is a run's id, or "latest".

    \b
    Examples:
      coordinator export digits-3f9a1c --which best --to model.safetensors
      coordinator export latest --agent pi-3 --to pi-3.safetensors
    """
    from coordinator import commands  # noqa: PLC0415

    sys.exit(commands.export(run_id, which, agent_id, path, state_dir))


@main.command(short_help="Write a small project that trains at once.")
@click.argument("name", metavar="NAME")
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="The directory to make [default: NAME].")
def new(name: str, directory: Path | None) -> None:
    """Write a small project that trains at once: task, settings, Compose file, test, README. Overwrites nothing.

    \b
    Examples:
      coordinator new flowers
      coordinator new flowers --dir ~/projects/flowers
    """
    from coordinator import project  # noqa: PLC0415

    sys.exit(project.create(name, directory))


_STATE_DIR = click.argument(
    "state_dir", default="midge-state", metavar="[STATE_DIR]", envvar="MIDGE_STATE_DIR", type=click.Path(path_type=Path)
)


@main.command(short_help="Check a state directory, and mend what is safe.")
@_STATE_DIR
@click.option("--repair", is_flag=True, help="Remove what nobody needs; no coordinator may be running.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(state_dir: Path, repair: bool, as_json: bool) -> None:
    """Check every digest and invariant of a state directory [default: midge-state]; a coordinator may be running in it.

    Exits with 0 where nothing is damaged, 1 where something is, 2 where there is nothing to check.

    \b
    Examples:
      coordinator verify midge-state
      coordinator verify /var/lib/midge --json
    """
    from coordinator.upkeep import commands  # noqa: PLC0415

    sys.exit(commands.verify(state_dir, as_json=as_json, repair=repair))


@main.command(short_help="Copy a state directory while it is at work.")
@_STATE_DIR
@click.option(
    "--to",
    required=True,
    metavar="DIR|TAR",
    type=click.Path(path_type=Path),
    help="New directory, .tar, .tar.gz or .tgz.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def backup(state_dir: Path, to: Path, as_json: bool) -> None:
    """Copy a state directory [default: midge-state] while a coordinator works in it; its round is not held up.

    \b
    Examples:
      coordinator backup midge-state --to /backup/midge-monday
      coordinator backup /var/lib/midge --to /backup/midge-monday.tar.gz
    """
    from coordinator.upkeep import commands  # noqa: PLC0415

    sys.exit(commands.backup(state_dir, to, as_json=as_json))


@main.command(short_help="Watch skewed agents learn together what none can alone.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=30, show_default=True, help="Rounds of the federation.")
@click.option(
    "--agents", "num_agents", type=click.IntRange(2, 10), default=3, show_default=True, help="Agent processes."
)
@click.option("--out", type=click.Path(path_type=Path), default="midge-demo", show_default=True, help="For the report.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and no progress.")
@click.option(
    "--broker",
    metavar="URL|mosquitto|embedded",
    help="Use this broker, or start that one [default: Mosquitto where it is installed, else the embedded one].",
)
@click.option("--seed", type=click.IntRange(0, 2**53), default=0, show_default=True, help="Of every random choice.")
def demo(rounds: int, num_agents: int, out: Path, as_json: bool, broker: str | None, seed: int) -> None:
    """Watch label-skewed agents learn together what none of them can learn alone.

    Starts a broker, a coordinator and the agents as processes on this machine, trains on real data (digits), then trains one
    agent alone and all data in one place on the same budget, and compares the three. Needs no root and no download.

    \b
    Examples:
      coordinator demo
      coordinator demo --rounds 10 --agents 5 --out /tmp/demo --json
    """
    from coordinator.experiment import demo as demonstration  # noqa: PLC0415

    sys.exit(demonstration.run(rounds, num_agents, out, as_json=as_json, broker=broker, seed=seed))


def _label_lists(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> Any:  # noqa: ARG001
    try:
        return [[int(label) for label in value.split(",") if label.strip()] for value in values] or None
    except ValueError:
        raise click.BadParameter(f"{', '.join(values)!r}: expected labels such as 1,2,3, once for each agent") from None


@main.command(short_help="Set a federation against data in one place and agents alone.")
@click.argument("config", required=False, type=click.Path(path_type=Path), envvar="MIDGE_CONFIG")
@click.option("--task", metavar="TASK", help="What is learned: a built-in name or package.module:object.")
@click.option("--rounds", type=int, metavar="N", help="Rounds of the federation.")
@click.option("--seed", type=int, metavar="N", help="The first seed.")
@click.option("--arms", metavar="A,B", help="federated, centralized, alone, alone:agent-2, local-average, fedsgd.")
@click.option("--seeds", type=int, metavar="N", help="How often, each time with the next seed [default: 3].")
@click.option("--agents", type=int, metavar="N", help="Agent processes [default: 3].")
@click.option(
    "--partition",
    metavar="P",
    help="How the data are dealt: iid, contiguous, shards:2, dirichlet:0.3, quantity:0.5 [default: iid].",
)
@click.option("--classes", multiple=True, metavar="1,2,3", callback=_label_lists, help="Labels, once for each agent.")
@click.option("--sel-prob", type=float, metavar="P", help="Share of the examples of its labels that an agent has.")
@click.option("--def-prob", type=float, metavar="P", help="Share of the examples of other labels.")
@click.option("--data-dir", metavar="DIR", help="Where the data lie.")
@click.option("--download", is_flag=True, default=None, help="Let the task fetch those that are not there.")
@click.option("--data-seed", type=int, metavar="N", help="Of the partition, which is the same for all seeds.")
@click.option("--threads", type=int, metavar="N", help="Threads of each process that trains [default: 1].")
@click.option(
    "--out", type=click.Path(path_type=Path), default="midge-compare", show_default=True, help="For all results."
)
@click.option(
    "--broker",
    metavar="URL|mosquitto|embedded",
    help="Use this broker, or start that one [default: Mosquitto where it is installed, else the embedded one].",
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting of the coordinator.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and no progress.")
def compare(
    config: Path | None,
    task: str | None,
    rounds: int | None,
    seed: int | None,
    download: bool | None,
    assignments: tuple[str, ...],
    broker: str | None,
    out: Path,
    as_json: bool,
    **table: Any,
) -> None:
    """See what federating buys: against all data in one place, and against agents that learn alone.

    Runs each way of learning on the same budget of gradient steps, with several seeds; the federated ones as processes over
    MQTT on this machine. CONFIG is a configuration file of the coordinator, which may have a table [compare].

    \b
    Examples:
      coordinator compare --partition dirichlet:0.3 --agents 5 --rounds 20
      coordinator compare experiment.toml --arms federated,centralized,alone:agent-2,local-average,fedsgd --seeds 5

    Interrupted, and started again in the same way, it goes on where it was. The results are in the directory of --out: tables
    (CSV, JSON), pictures, and one page to look at or to send, compare.html.
    """
    from coordinator.experiment import compare as comparison  # noqa: PLC0415

    options = {"task": task, "rounds": rounds, "seed": seed, "download": download}
    code = comparison.run(
        config, options=options, compare=table, assignments=assignments, broker=broker, out=out, as_json=as_json
    )
    sys.exit(code)
