"""One file per benchmark, each with `run(arguments) -> dict`; `launch/bench.py NAME` runs it and prints its result."""
