"""Datasets on disk -> records -> tar shards + index -> PK batches and sequential passes.

Nothing here knows of the model, Ray or DeepSpeed: rank and world size arrive as arguments.
"""
