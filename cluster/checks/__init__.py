"""What is checked before a run: settings and data before any worker starts, machines before training."""
