"""Our programs with a network thread that dies once a file is there: `python -m tests.broker.deaf FILE PROGRAM ARGUMENTS`.

It dies as by a bug that nothing catches: all that is an Exception, the thread outlives.
"""

import runpy
import sys
from pathlib import Path

from midge.transport.network import NetworkThread

_file = Path(sys.argv[1])
_turn = NetworkThread._turn


def _turn_or_die(self, *arguments):
    if _file.exists():
        raise SystemExit
    return _turn(self, *arguments)


NetworkThread._turn = _turn_or_die
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
