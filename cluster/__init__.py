"""One process among many: process groups, DeepSpeed engines, stage loops, checkpoints, faults, Ray Train."""
