"""Weights in and out: CLIP's, those of the paper's authors, and our own files with their card."""
