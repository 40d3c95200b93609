"""The inner loops: `reference.py` is the readable truth; `cpu.py` with `nf4_*.cpp` is tested equal to it."""
