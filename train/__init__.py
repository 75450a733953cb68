"""Training and evaluation: one loop, built on timm and PyTorch."""

import os

# A thread of GNU OpenMP that waits for another spins for long before it sleeps. Where two programs share the cores,
# each keeps the other from running, and steps took 3 to 25 times as long. Read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
