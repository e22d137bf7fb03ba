"""The demo dataset: vehicles drawn in software, seen by several cameras."""
