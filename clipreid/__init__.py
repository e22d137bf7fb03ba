"""The method, in plain single-process PyTorch: encoders, prompts, losses, schedules, augmentation, metrics.

Nothing here knows of ranks, process groups, Ray, DeepSpeed or tar files: what crosses ranks arrives as an argument.
"""
