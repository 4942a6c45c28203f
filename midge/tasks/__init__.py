"""Tasks: what is learned. `base` says what one is, `registry` finds it by name; torch is imported in task files only."""
