"""A tool's command line with a fault that environment variables describe, for support.jobs.Job.

FAULT_NAN="RANK:FIRST:LAST:WHERE": in steps FIRST to LAST of process RANK (-1: of all), counted from 1, the first
image's output of the model's module WHERE is NaN or, with WHERE=gradient, a gradient of its last parameter.
FAULT_SLEEP="RANK:STEP:SECONDS": before that step the process sleeps. FAULT_KILL="RANK:STEP:SIGNAL": it gets a signal.
FAULT_FACT="RANK:KEY=VALUE": an override that one process alone gets; FAULT_VERSION="RANK:PACKAGE=VERSION" likewise.
FAULT_WRITE="STEP:ERRNO": the checkpoint of that step fails halfway with this error; ERRNO=kill ends the process there.
"""

import errno
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import torch

RANK = int(os.environ.get("RANK", 0))


def _fault(name: str) -> list[str] | None:
    """Return the fields of a fault that concerns this process."""
    fields = os.environ.get(f"FAULT_{name}", "").split(":")
    return fields[1:] if len(fields) > 1 and int(fields[0]) in (RANK, -1) else None


def install() -> None:
    """Patch what the faults need."""
    from saccade.train.runtime import checkpoint, log, numbers

    begin = numbers.Numbers.begin

    def faulty_begin(self) -> None:
        begin(self)
        step = self.state.step + 1
        if (fault := _fault("NAN")) and int(fault[0]) <= step <= int(fault[1]):
            _spoil(self.model, fault[2])
        else:
            _spoil(self.model, None)
        if (fault := _fault("SLEEP")) and int(fault[0]) == step:
            time.sleep(float(fault[1]))
        if (fault := _fault("KILL")) and int(fault[0]) == step:
            os.kill(os.getpid(), getattr(signal, fault[1]))

    numbers.Numbers.begin = faulty_begin
    if fault := _fault("FACT"):
        sys.argv.append(":".join(fault))
    if fault := _fault("VERSION"):
        name, version = fault[0].split("=")
        from saccade.train import engine

        engine.versions = lambda: log.versions() | {name: version}
    if fault := os.environ.get("FAULT_WRITE"):
        step, kind = fault.split(":")
        save, save_file = checkpoint.save, checkpoint.save_file
        now = {}

        def noting(folder, tensors, meta, *rest, **options):
            now.update(meta)
            save(folder, tensors, meta, *rest, **options)

        def failing(tensors, path, *rest):
            save_file(tensors, path, *rest)
            if now["step"] == int(step):
                os.truncate(path, Path(path).stat().st_size // 2)
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))

        checkpoint.save_file = failing
        from saccade.train import engine

        engine.save_checkpoint = noting


_handles: list = []


def _spoil(model: torch.nn.Module, where: str | None) -> None:
    while _handles:
        _handles.pop().remove()
    if where == "gradient":
        last = [p for p in model.parameters() if p.requires_grad][-1]
        _handles.append(last.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), float("nan"))))
    elif where is not None:

        def first_is_nan(module, inputs, output):
            if isinstance(output, torch.Tensor) and module.training:
                return output.index_fill(0, torch.tensor([0]), float("nan"))

        _handles.append(model.get_submodule(where).register_forward_hook(first_is_nan, prepend=True))


def main() -> None:
    install()
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools/train.py"))["main"]()
