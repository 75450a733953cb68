"""Sparsifiner with the published arithmetic: dense scores, masks and attention, the softmax twice, all kept until the
end of the forward pass, which returns them with the logits; tokens are masked, not removed (arXiv 2303.13755).

The peer of saccade's `sparsifiner_*` in tools/benchmark.py, at 224 x 224; takes the same state dict.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {  # dim, depth, heads
    "sparsifiner_deit_t": (192, 12, 3),
    "sparsifiner_deit_s": (384, 12, 6),
    "sparsifiner_deit_b": (768, 12, 12),
    "sparsifiner_lvvit_s": (384, 16, 6),
    "sparsifiner_lvvit_m": (512, 20, 8),
}
TOKENS, BASIS, WIDTH, TOPK, KEEP, THRESHOLD = 197, 32, 32, 8, 0.25, 0.02


class MaskPredictor(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = (nn.Parameter(torch.zeros(TOKENS, BASIS)) for _ in range(2))
        self.proj_q, self.proj_k = (nn.Linear(64, WIDTH) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, alive: Tensor | None) -> list[Tensor]:  # (B, H, N, 64) twice
        B, H, N, _ = q.shape
        qc, kc = self.proj_q(q), self.proj_k(k)
        if alive is not None:
            there = F.pad(alive, (1, 0), value=True)[:, None, :, None]
            qc, kc = qc * there, kc * there
        coef = ((qc @ (kc.transpose(-2, -1) @ self.down)) * H**-0.5)[:, :, 1:].softmax(-1)  # (B, H, N-1, K)
        basis = self.up.t().abs()
        basis = torch.where(basis > THRESHOLD, basis, torch.zeros_like(basis))
        best = coef.topk(TOPK, -1)
        coef = torch.zeros_like(coef).scatter(-1, best.indices, best.values)
        scores = coef @ basis  # (B, H, N-1, N)
        budget, masked = math.ceil(KEEP * N), scores.clone()
        if alive is not None:
            budget = min(budget, int(alive[0].sum()))
            masked = masked.masked_fill(~F.pad(alive, (1, 0), value=True)[:, None, None], -math.inf)
        mask = torch.zeros_like(scores).scatter(-1, masked.topk(budget, -1).indices, 1.0)
        return [torch.cat([mask.new_ones(B, H, 1, N), mask], 2).detach(), scores, coef]


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, bias: bool, token_keep: int | None):
        super().__init__()
        self.heads, self.token_keep = heads, token_keep
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)
        self.predictor = MaskPredictor()

    def forward(self, x: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        if alive is not None:
            there = F.pad(alive, (1, 0), value=True)[:, None, :, None]
            q, k, v = q * there, k * there, v * there
        mask, *estimate = self.predictor(q, k, alive)
        logits = (q @ k.transpose(-2, -1)) * 64**-0.5
        dense = logits.softmax(-1)
        attn = logits.clone().masked_fill(mask == 0, -math.inf).softmax(-1).nan_to_num()
        if self.token_keep is not None:
            score = attn[:, :, 0, 1:].mean(1)
            if alive is not None:
                score = score.masked_fill(~alive, -math.inf)
            index = score.topk(self.token_keep, -1).indices
            alive = torch.zeros_like(score, dtype=torch.bool).scatter(-1, index, True)
        out = self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))
        return out, alive, [mask, attn, dense, *estimate]


class Block(nn.Module):
    def __init__(self, dim: int, attn: Attention, mlp_ratio: int, eps: float, skip: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn, self.skip = attn, skip
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, mlp_ratio * dim), "fc2": nn.Linear(mlp_ratio * dim, dim)})

    def forward(self, x: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        y, alive, seen = self.attn(self.norm1(x), alive)
        x = x + y / self.skip
        x = x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))) / self.skip
        if alive is not None:
            x = x * F.pad(alive, (1, 0), value=True)[..., None]
        return x, alive, seen


class Sparsifiner(nn.Module):
    def __init__(self, name: str, token_keep_rate: float = 1.0, num_classes: int = 1000):
        super().__init__()
        dim, depth, heads = SIZES[name]
        self.lvvit = "lvvit" in name
        if self.lvvit:
            convs: list[nn.Module] = []
            for c, kernel, stride in ((3, 7, 2), (64, 3, 1), (64, 3, 1)):
                convs += [nn.Conv2d(c, 64, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
            self.stem = nn.Sequential(*convs, nn.Conv2d(64, dim, 8, 8))
        else:
            self.stem = nn.Sequential(nn.Conv2d(3, dim, 16, 16))
        eps, mlp_ratio, skip = (1e-5, 3, 2.0) if self.lvvit else (1e-6, 4, 1.0)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, TOKENS, dim))
        keep = {}
        if token_keep_rate < 1:
            keep = {depth * i // 4: math.ceil(token_keep_rate**i * (TOKENS - 1)) for i in (1, 2, 3)}
        attn = [Attention(dim, heads, not self.lvvit, keep.get(i)) for i in range(depth)]
        self.blocks = nn.ModuleList([Block(dim, a, mlp_ratio, eps, skip) for a in attn])
        self.norm, self.head = nn.LayerNorm(dim, eps), nn.Linear(dim, num_classes)
        self.aux = nn.Linear(dim, num_classes) if self.lvvit else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x, alive = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed, None
        returned = []
        for block in self.blocks:
            x, alive, seen = block(x, alive)
            returned.append(seen)
        x = self.norm(x)
        logits = self.head(x[:, 0])
        if self.aux is not None:
            scores = self.aux(x[:, 1:])
            if not self.training:
                logits = logits + 0.5 * scores.max(1)[0]
        return logits

    def load(self, ours: nn.Module) -> "Sparsifiner":
        """Load the weights of saccade's model of the same name."""
        state = {}
        for key, value in ours.state_dict().items():
            part = key.split(".")
            if key.startswith("stem.convs."):  # convolution, norm and activation are one module there
                key = f"stem.{3 * int(part[2]) + (part[3] == 'bn')}.{part[-1]}"
            elif key.startswith("stem.proj."):
                key = f"stem.{9 if self.lvvit else 0}.{part[-1]}"
            state[key.replace("head.fc.", "head.")] = value
        self.load_state_dict(state)
        return self


def build(name: str, token_keep_rate: float = 1.0) -> Sparsifiner:
    return Sparsifiner(name, token_keep_rate)
