"""`python -m coordinator`: the same as the command `coordinator`."""

from coordinator.cli import main

main()
