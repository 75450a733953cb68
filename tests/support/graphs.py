"""Check that a model compiled and exported computes what it computes eagerly."""

import pytest
import torch
from torch import nn

# inductor compiles C++ for 20 to 45 s per model; aot_eager runs the same graph without it.
BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])


def compiles_and_exports(model: nn.Module, size: tuple[int, int], backend: str = "aot_eager") -> None:
    """Check torch.compile in one graph and torch.export with any batch size.

    All models share Backbone.forward: after another model of this process with other sizes, torch would compile it for
    any size, which takes inductor minutes where padding depends on the size; hence the reset and dynamic=False.
    """
    torch.compiler.reset()
    model, x, more = model.eval(), torch.randn(2, 3, *size), torch.randn(5, 3, *size)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}).module()
    # A thousand roundings of float32: compiled models sum in another order, through few layers.
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(exported(more), model(more), rtol=1e-4, atol=1e-5)
