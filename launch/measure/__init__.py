"""What the benchmarks share: timing, memory, made-up features, the published models, and loops of stage 2."""
