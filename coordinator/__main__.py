"""`python -m coordinator`, and the command `coordinator`: Ctrl-C is minded before anything is imported that takes time."""

import sys

from coordinator.experiment.interrupts import exit_at_once

_EXTRAS = {"sqlalchemy", "starlette", "uvicorn", "prometheus_client", "rich", "safetensors", "matplotlib", "amqtt"}


def main() -> None:
    """Run the command line."""
    exit_at_once()
    from coordinator.cli import main as run  # noqa: PLC0415

    try:
        run()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRAS:
            raise
        sys.exit(f"coordinator: {error.name} is not installed: pip install 'midge[torch,coordinator]'")


if __name__ == "__main__":
    main()
