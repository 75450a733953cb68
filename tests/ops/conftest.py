"""Run kernels by Triton's interpreter where there is no GPU, before anything imports one."""

from support.ops import interpret

interpret()
