"""Our programs as another version of Midge: `python -m tests.broker.skewed PROTOCOL coordinator|edge_agent ARGUMENTS...`."""

import runpy
import sys

import midge

midge.PROTOCOL = int(sys.argv[1])
midge.__version__ = "9.9.9"
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
