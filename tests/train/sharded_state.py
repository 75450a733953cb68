"""Save a small sharded model's state, or read it and compare it with the full tensors, in any number of processes."""

import contextlib
import sys
from pathlib import Path

import torch
from saccade.train.runtime import sharded
from saccade.train.runtime.checkpoint import Unreadable
from saccade.train.runtime.distributed import apply_fsdp, full_tensor, process_group, rank, world_size
from saccade.train.runtime.state import State
from safetensors.torch import load_file, save_file
from torch import nn

CPU = torch.device("cpu")


def make_state() -> State:
    """Return the state after a step: parameters of fewer rows than processes, buffers, scalars, a window of losses."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    if world_size() > 1:
        apply_fsdp(net, CPU)
    optimizer = torch.optim.AdamW(net.parameters())
    state = State(net, None, optimizer, torch.amp.GradScaler("cpu", enabled=False), "")
    torch.manual_seed(rank())
    net(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    state.step = 1
    state.note(dict(loss=torch.tensor(2.5), top1=torch.tensor(50.0)))
    return state


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    with process_group():
        state = make_state()
        if mode == "save":
            tensors, meta = state.content(gather=False)
            sharded.save(folder, tensors, meta, best=True)
            full = {name: full_tensor(tensor).contiguous() for name, tensor in tensors.items()}
            if rank() == 0:
                save_file(full, folder / "full.safetensors")
            return
        if mode == "damaged":
            file = folder / "best/shard-00002-model-00001-of-00001.safetensors"
            if rank() == 0:
                content = bytearray(file.read_bytes())
                content[-1] ^= 1
                file.unlink()  # a hard link
                file.write_bytes(content)
            if world_size() > 1:
                torch.distributed.barrier()
            with contextlib.suppress(Unreadable):
                sharded.read(folder / "best", state._like)
                raise AssertionError("damage was not noticed")
            return
        expected = load_file(folder / "full.safetensors")
        read, meta = sharded.read(folder / "last", state._like)
        assert read.keys() == expected.keys() and meta["step"] == 1
        if world_size() > 1:
            assert any(
                name.startswith("optimizer.") and tensor is not full_tensor(tensor) for name, tensor in read.items()
            )
        assert state.load(folder, CPU, 2)[-1] == "resuming after step 1"
        for found in (read, state.content(gather=False)[0]):
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                full = full_tensor(tensor)
                assert torch.equal(full, expected[name]) and full.dtype == expected[name].dtype, name
