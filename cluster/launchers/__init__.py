"""How workers are placed and started: Ray Train, torchrun, or this process alone."""
