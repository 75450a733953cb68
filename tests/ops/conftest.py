"""Triton's interpreter for the kernels where there is no GPU, before anything imports one."""

from support.ops import interpret

interpret()
