"""Plain transcriptions of published models, kept as the peers that tools/benchmark.py measures against.

Each is written from the paper and from the facts of the published implementation, in the form that users run today:
windows by permuted copies, routed keys and values gathered, logits in memory. They hold the same parameters as our
models, so that a benchmark can fill both alike and show that both compute the same thing.
"""
