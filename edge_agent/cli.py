"""The command `edge-agent`.

Exit codes: 0 done, 1 it failed, 2 wrong use or configuration.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from edge_agent.config import Settings, load_settings
from midge import __version__, failpoints, log
from midge.settings import SettingsError
from midge.tasks.errors import TaskError
from midge.tasks.references import check_reference
from midge.transport.address import Address, AddressError

S = TypeVar("S", bound=Settings)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edge-agent")
def main() -> None:
    """Train on this device's data, as one agent of a federation. The data never leave it."""


def _common(command: Any) -> Any:
    """Options that every command takes: who this is, and how to reach the broker."""
    options = [
        click.option("--broker", metavar="URL", help="mqtt://, mqtts://, ws:// or wss://, host and port."),
        click.option("--federation", metavar="NAME", help="Which federation to join."),
        click.option("--agent-id", metavar="ID", help="Name of this agent [default: from the host's name]."),
        click.option("--task", metavar="TASK", help="What is learned: a name, package.module:object or my_task.py."),
        click.option("--data-dir", metavar="DIR", help="Where this device's data lie."),
        click.option("--download", is_flag=True, default=None, help="Let the task fetch data that are not there."),
        click.option("--classes", metavar="1,2,3", help="Labels that this agent owns."),
        click.option("--sel-prob", type=float, metavar="P", help="Share of the examples of its labels that it has."),
        click.option("--def-prob", type=float, metavar="P", help="Share of the examples of other labels."),
        click.option(
            "--partition",
            metavar="P",
            help="iid, contiguous, shards:2, dirichlet:0.3, quantity:0.5; with --index and --of.",
        ),
        click.option("--index", type=int, metavar="I", help="Which part is this agent's, from 0."),
        click.option("--of", type=int, metavar="N", help="How many parts there are."),
        click.option("--state-dir", metavar="DIR", help="Where unfinished work is kept [default: midge-agent]."),
        click.option("--threads", type=int, metavar="N", help="Threads that training uses [default: 1]."),
        click.option("--label", "labels", multiple=True, metavar="K=V", help="What a coordinator may select by."),
        click.option("--username", metavar="NAME", help="User name at the broker."),
        click.option("--password-file", metavar="FILE", help="File whose first line is the password."),
        click.option("--ca-file", metavar="FILE", help="Certificates that the broker's must be signed by."),
        click.option("--cert-file", metavar="FILE", help="This agent's certificate."),
        click.option("--key-file", metavar="FILE", help="Its private key."),
        click.option("--metrics-port", type=int, metavar="PORT", help="Serve this agent's own metrics; 0: any port."),
        click.option("--log-format", type=click.Choice(["human", "json"]), help="How log lines look."),
        click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="What is logged."),
        click.option(
            "--config", "file", type=click.Path(path_type=Path), envvar="MIDGE_CONFIG", help="TOML or JSON file."
        ),
        click.option(
            "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting; wins over all else."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@_common
@click.option(
    "--while-stdin-open", is_flag=True, help="Stop when standard input ends: for a program that starts agents."
)
def run(file: Path | None, assignments: tuple[str, ...], while_stdin_open: bool, **options: Any) -> None:
    """Join a federation and train whenever invited, until stopped.

    \b
    Examples:
      edge-agent run --broker mqtt://192.168.1.10:1883 --agent-id pi-3 --task digits --classes 1,2,3 --def-prob 0.05
      edge-agent run --config agent.toml --set threads=2
      edge-agent run --broker mqtts://broker.example.org --ca-file ca.pem --partition shards:2 --index 0 --of 10

    SIGTERM and Ctrl-C stop it cleanly. Unfinished work is kept in the state directory, and goes on at the next start.
    """
    settings, address = _load(file, assignments, options)
    try:
        check_reference(settings.task)  # a slip is for whoever typed it, not for a log
    except TaskError as error:
        _fail(str(error), 2)
    log.setup(settings.log_format, settings.log_level)
    from edge_agent.journal import JournalError  # noqa: PLC0415  help and errors need no more than is above
    from edge_agent.service import NetworkThreadError, Service  # noqa: PLC0415

    try:
        failpoints.arm("agent")
        service = Service(settings, address)
        if while_stdin_open:
            threading.Thread(target=_stop_after_stdin, args=(service.stop,), name="stdin", daemon=True).start()
        service.run()
    except (JournalError, failpoints.FailPointError) as error:
        _fail(str(error), 2)
    except NetworkThreadError as error:
        _fail(str(error), 1)
    except MemoryError:
        _fail(f"agent {settings.agent_id}: out of memory; its work is kept: start it again, with more", 1)


@main.command(short_help="Check that this agent could work, and say what is wrong.")
@_common
@click.option("--timeout-s", type=float, default=10.0, show_default=True, help="Longest wait for the broker.")
def doctor(file: Path | None, assignments: tuple[str, ...], timeout_s: float, **options: Any) -> None:
    """Check that this agent could work: broker, topics, data, memory, torch. One line each, with what to do.

    \b
    Examples:
      edge-agent doctor --broker mqtt://192.168.1.10:1883 --agent-id pi-3 --task digits
    """
    settings, address = _load(file, assignments, options)
    log.setup(settings.log_format, "error")
    from edge_agent.doctor import examine  # noqa: PLC0415

    is_well = True
    for finding in examine(settings, address, timeout_s):
        is_well = is_well and finding.is_well
        mark = click.style("ok  ", fg="green") if finding.is_well else click.style("FAIL", fg="red")
        click.echo(f"{mark}  {finding.what}: {finding.text}")
    sys.exit(0 if is_well else 1)


@main.command()
@_common
@click.option("--json", "as_json", is_flag=True, help="Print what there is as JSON.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it into a PNG file.")
def data(file: Path | None, assignments: tuple[str, ...], *, as_json: bool, plot: Path | None, **options: Any) -> None:
    """Show what this agent would train on: examples and labels. Nothing is sent, and no broker is needed.

    With a partition and no --index, every part of it is shown.

    \b
    Examples:
      edge-agent data --task digits --classes 1,2,3 --def-prob 0.05
      edge-agent data --partition dirichlet:0.3 --of 10 --plot parts.png
      edge-agent data --config agent.toml --json

    Exits with 1 where there are no data to train on, and says what to do.
    """
    from edge_agent.data import DataSettings, show  # noqa: PLC0415  with it comes NumPy

    settings = _settings(DataSettings, file, assignments, options)
    log.setup(settings.log_format, "error")
    sys.exit(show(settings, as_json=as_json, plot=plot))


def _stop_after_stdin(stop: Callable[[], None]) -> None:
    # Not through sys.stdin: a thread that waits in it holds its lock, which the interpreter needs to end.
    while os.read(0, 4096):
        pass
    stop()


def _load(file: Path | None, assignments: tuple[str, ...], options: dict[str, Any]) -> tuple[Settings, Address]:
    """The settings, and the broker's address with its credentials; ends the program where they are wrong."""
    settings = _settings(Settings, file, assignments, options)
    try:
        address = Address.parse(
            settings.broker,
            username=settings.username or None,
            password=settings.read_password() or None,
            ca_file=settings.ca_file or None,
            cert_file=settings.cert_file or None,
            key_file=settings.key_file or None,
        )
    except (SettingsError, AddressError) as error:
        _fail(str(error), 2)
    return settings, address


def _settings(kind: type[S], file: Path | None, assignments: tuple[str, ...], options: dict[str, Any]) -> S:
    """The settings; ends the program where they are wrong."""
    options = {key: value for key, value in options.items() if value not in (None, ())}
    try:
        return load_settings(kind, file=file, environ=os.environ, options=options, assignments=assignments)
    except SettingsError as error:
        _fail(str(error), 2)


def _fail(text: str, code: int) -> NoReturn:
    click.echo(f"edge-agent: {text}", err=True)
    sys.exit(code)
