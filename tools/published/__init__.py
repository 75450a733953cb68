"""Peers of our models for tools/benchmark.py: the published arithmetic, in code of our own.

Each is written from the paper's equations and does what the published implementation does with memory: windows by
permuted copies, routed keys and values gathered, logits stored. They have the same parameters as our models, so that
a benchmark loads the same weights into both and checks that both compute the same outputs.
"""
