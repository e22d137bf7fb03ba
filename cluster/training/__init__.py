"""Training on every worker: both stages, the loop, the engine, checkpoints."""
