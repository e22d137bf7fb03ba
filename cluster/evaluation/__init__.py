"""Weights applied to images: features, metrics, feature files and figures."""
