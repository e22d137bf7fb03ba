"""Weights at work on images: features, metrics, feature files and figures."""
