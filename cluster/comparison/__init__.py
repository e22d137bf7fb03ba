"""Runs side by side: settings that differ, figures with intervals, queries that changed."""
