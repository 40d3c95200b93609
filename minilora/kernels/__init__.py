"""The inner loops: `reference.py` is the readable truth, every faster kernel is tested equal to it."""
