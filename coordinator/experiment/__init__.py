"""Whole federations on this machine, to show and to measure: `coordinator demo` and `coordinator compare`.

    agents, federation, attendance, holding     a broker, the coordinator in this process, agents; what each holds
    helper, baselines, scores                   a process that trains without a federation, tests and draws
    interrupts                                  nothing is left running, however it ends

What is named after one of the two is for that one alone; `budget` is for the comparison.
"""
