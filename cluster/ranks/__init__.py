"""The ranks of a run: their process group, its collectives, and a watchdog over both."""
