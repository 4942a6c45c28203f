"""Looking after a state directory from outside, while a coordinator may be at work in it.

Files
    commands     `coordinator verify`, `backup` and `runs forget`, once their options are read
    verify       checks everything, and removes what nobody needs
    verify_runs  the invariants that can be read off the database's rows
    strays       what lies beside what the database names
    findings     what a check can find
    backup       a consistent copy
    forget       removes a run
    spool_scan   reads a segment that somebody else may be writing
"""
