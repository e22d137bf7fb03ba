"""A run folder: what is in it, who writes it, and how it is looked at."""
