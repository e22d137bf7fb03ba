"""The method, in plain single-process PyTorch: encoders, prompts, losses, schedules, augmentation, metrics.

Nothing here knows of process groups, Ray, DeepSpeed or tar files: what crosses ranks goes through `peers`, an argument.
"""
