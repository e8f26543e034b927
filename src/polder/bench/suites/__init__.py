"""One file for each bench: its plan, its arms, its stages and its limits."""
