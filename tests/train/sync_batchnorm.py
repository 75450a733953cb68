"""Run under torchrun: a model trained over processes, beside the same model trained on whole batches."""

import timm
import torch
from saccade.train.runtime.distributed import SyncBatchNorm, process_group, rank, sync_batchnorm, world_size
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

BATCH = 24

with process_group():
    for name in ("test_resnet", "test_efficientnet"):  # torch's BatchNorm2d, and timm's with an activation
        torch.manual_seed(0)
        whole = timm.create_model(name, num_classes=10).double()
        torch.manual_seed(0)
        shared = sync_batchnorm(timm.create_model(name, num_classes=10).double(), torch.device("cpu"))
        assert any(isinstance(module, SyncBatchNorm) for module in shared.modules())
        assert whole.state_dict().keys() == shared.state_dict().keys()
        parallel = DistributedDataParallel(shared)
        steps = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (whole, shared)]
        own = slice(rank() * BATCH // world_size(), (rank() + 1) * BATCH // world_size())
        for seed in range(4):
            g = torch.Generator().manual_seed(seed)
            x, y = torch.randn(BATCH, 3, 32, 32, generator=g).double(), torch.randint(10, (BATCH,), generator=g)
            cross_entropy(whole(x), y).backward()
            cross_entropy(parallel(x[own]), y[own]).backward()
            for step in steps:
                step.step()
                step.zero_grad()
            for key, value in whole.state_dict().items():
                torch.testing.assert_close(shared.state_dict()[key], value, rtol=1e-10, atol=1e-12)
        whole.eval(), shared.eval()
        torch.testing.assert_close(shared(x), whole(x), rtol=1e-10, atol=1e-12)
