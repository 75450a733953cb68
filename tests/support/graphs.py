"""A model compiled and exported computes what it computes eagerly."""

import torch
from torch import nn


def compiles_and_exports(model: nn.Module, size: tuple[int, int], backend: str = "aot_eager") -> None:
    """torch.compile in one graph, torch.export with any batch size. aot_eager takes a quarter of inductor's time.

    All models share Backbone.forward: after another model of this process with other sizes, torch would compile it for
    any size, which takes inductor minutes where padding depends on the size; hence the reset and dynamic=False.
    """
    torch.compiler.reset()
    model, x, more = model.eval(), torch.randn(2, 3, *size), torch.randn(5, 3, *size)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}).module()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(exported(more), model(more), rtol=1e-4, atol=1e-5)
