"""What `bench.py gpu` runs, and how: parts under limits of their own, their results as one file and one page."""
