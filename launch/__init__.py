"""Thin entry points: parse, validate, call."""
