"""The command lines. Each file is a program; the command `saccade` runs them by name."""
