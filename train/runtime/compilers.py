"""The C++ compiler that torch.compile and AOTInductor call on a CPU."""

import os
import shutil


def find_cpp_compiler() -> str | None:
    """Return the path of $CXX, g++ or clang++, the first that is there, or None."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None
