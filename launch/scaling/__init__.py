"""What `bench.py scale` and `bench.py cluster` share: ranks on this machine, steps of a stage, bytes, and charts."""
