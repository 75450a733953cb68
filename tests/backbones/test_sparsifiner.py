"""Sparsifiner equals the published models, begins as its dense parents, and does what a timm backbone should."""

import math
import re

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
import torch.nn.functional as F
from saccade.backbones.sparsifiner import MaskPredictor, Record, SparseAttention, rename
from saccade.ops import unpack_mask
from support import parity
from support.backbones import Backbone
from support.levels import exhaustive
from support.parity import load_file
from torch import nn

pytestmark = pytest.mark.usefixtures("double")  # as default type


SMALL = dict(img_size=64, dim=32, depth=4, heads=2, reduce_n=2, coef_topk=3, num_classes=7)
MODELS = [("sparsifiner_deit_t", {}), ("sparsifiner_deit_t", dict(token_keep_rate=0.6)), ("sparsifiner_lvvit_s", {})]
KINDS = pytest.mark.parametrize(("name", "kwargs"), MODELS, ids=["deit", "deit pruned", "lvvit"])


def small(name: str = "sparsifiner_deit_t", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | kwargs))
    with torch.no_grad():  # at first scores hardly differ
        for key, p in model.named_parameters():
            if "predictor" in key or "qkv" in key:
                p.add_(0.2 * torch.randn_like(p))
    return model


def to_published(key: str) -> str:
    key = re.sub(r"^stem\.convs\.(\d)\.(conv|bn)\.", lambda m: f"patch_embed.{m[2]}{int(m[1]) + 1}.", key)
    key = key.replace("stem.", "patch_embed.").replace("head.fc.", "head.").replace("aux.", "aux_head.")
    key = key.replace("predictor.down", "predictor.proj_n").replace("predictor.up", "predictor.proj_back_n")
    return re.sub(r"predictor\.proj_([qk])\.", r"predictor.proj_c_\1.", key).replace("predictor.", "mask_predictor.")


class TestSparsifiner(Backbone):
    FIXTURES, NAME, SMALL, small = "sparsifiner", "sparsifiner_deit_t", SMALL, staticmethod(small)
    rename, published = staticmethod(rename), staticmethod(to_published)
    FORMS = {
        "deit": dict(name="sparsifiner_deit_t"),
        "deit pruned": dict(name="sparsifiner_deit_t", token_keep_rate=0.6),
        "lvvit": dict(name="sparsifiner_lvvit_s"),
    }
    WHOLE = (
        exhaustive("sparsifiner_t_keep25_b2", "sparsifiner_deit_t", {}),
        ("sparsifiner_t_keep10_160", "sparsifiner_deit_t", dict(img_size=160, keep_rate=0.1)),
        ("sparsifiner_t_token70", "sparsifiner_deit_t", dict(token_keep_rate=0.7)),
        exhaustive("sparsifiner_s_keep25", "sparsifiner_deit_s", {}),
        exhaustive("sparsifiner_lvvit_s_keep25", "sparsifiner_lvvit_s", {}),
    )
    COUNTS = dict(
        sparsifiner_deit_t=5_918_632,
        sparsifiner_deit_s=22_251_880,
        sparsifiner_deit_b=86_768_872,
        sparsifiner_lvvit_s=26_420_112,
        sparsifiner_lvvit_m=56_165_904,
    )
    test_macs = None  # attention's alone are published: test_macs_of_attention
    test_any_size = None  # images have the size of the positions: test_maps_of_any_img_size
    FILES = {"deit": FORMS["deit"], "lvvit": FORMS["lvvit"]}
    PREFIXES = ("", "module.")
    ALIENS = {
        "another depth": (dict(depth=3), "entries of its blocks do not fit"),
        "another host": (dict(name="sparsifiner_lvvit_s"), "entries of its blocks do not"),
        "another family": ("test_resnet", "entries of its blocks do not"),
        "another width": ("deit_tiny_patch16_224", ""),
    }
    IMPOSSIBLE = (
        (dict(host="vit"), "host must be 'deit' or 'lvvit', got 'vit'"),
        (dict(img_size=100), "img_size must be a multiple of 16, got 100"),
        (dict(heads=3), "heads must divide dim, got 3 heads for 32 channels"),
        (dict(reduce_n=20), "reduce_n=20 leaves 0 coefficients of 17 tokens"),
        (dict(coef_topk=9), "coef_topk from 1 to 8, got 9"),
        (dict(keep_rate=(0.5, 0.5)), r"keep_rate must be above 0 and at most 1, one number or 4, got \(0.5, 0.5\)"),
        (dict(keep_rate=1.5), "keep_rate must be above 0 and at most 1, one number or 4, got 1.5"),
        (dict(token_keep_rate=0.0), "token_keep_rate must be above 0 and at most 1, .* got 0.0 with 4"),
        (dict(token_keep_rate=0.5, depth=3), "only with at least 4 blocks, got 0.5 with 3"),
        (dict(token_keep_rate=0.7, host="lvvit"), "token_keep_rate must be 1 for LV-ViT, .* got 0.7"),
        (dict(global_pool="max"), "global_pool must be 'token', 'avg' or '', got 'max'"),
    )
    BLOCKS = 4
    ROUNDING = 0.1
    LEARNING = dict(drop_path_rate=0.1, drop_rate=0.1)
    IMAGES, FALL = (7, 3, 64, 64), 0.7
    BACKENDS = ("aot_eager",)
    COMPILED = {
        "deit pruned": dict(token_keep_rate=0.5),
        "lvvit": exhaustive(dict(name="sparsifiner_lvvit_s", depth=1)),
    }

    def test_equals_published_model(self, tmp_path, fixture, name, arguments):
        want = parity.load("sparsifiner", fixture)
        outputs, x = want["outputs"], parity.image(want)
        model = load_file(tmp_path, {"model": parity.weights(want)}, name, **arguments)
        logits = model(x)
        parity.assert_equal("logits", logits, outputs["logits"])
        assert sum(p.numel() for p in model.parameters()) == want["params"]
        (logits * parity.seeded(1, logits.shape)).sum().backward()
        parity.assert_gradients(model, want["grads"], rename)
        with torch.no_grad():
            out = model.distill(x)
        parity.assert_equal("features", out.features, outputs["features"])
        for key, expected in outputs.items():
            kind, layer = re.fullmatch(r"(\w+?)(\d*)", key).groups()
            if layer and kind != "basis_coef":
                parity.assert_equal(key, inside(out, kind, int(layer)), expected)

    def test_images_do_not_see_each_other(self, form):
        """The published budget of keys is that of the first image, and of batches before."""
        x = torch.randn(4, 3, 64, 64)
        for model in (small(**form).eval(), small("sparsifiner_deit_t", keep_rate=0.9, token_keep_rate=0.5)):
            together = model(x)
            for i in range(4):
                torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1], rtol=1e-12, atol=1e-12)
            assert torch.equal(model(x), together)

    def test_bfloat16_autocast_is_close(self, form):
        """The keys are chosen in float32, from queries and keys that autocast has rounded."""
        super().test_bfloat16_autocast_is_close(form | dict(keep_rate=0.5))
        model = small(**form, keep_rate=0.5).eval()
        with torch.autocast("cpu", torch.bfloat16):
            scores = model.distill(torch.randn(2, 3, 64, 64)).connectivity
        assert all(S.dtype == torch.float32 for S in scores)


def inside(out, kind: str, layer: int):
    """What the fixtures record of a layer."""
    if kind == "token_mask":  # after the layer; the class token looks at every patch that is left
        return out.alive if layer == 9 else out.mask[layer + 1][:, 0, 0, 1:]
    attention, mask = out.attention[layer], out.mask[layer]
    masked = attention * mask
    return dict(
        approx_attn=out.connectivity[layer],
        attn_mask=mask,
        unmasked_attn=attention,
        masked_attn=masked / masked.sum(-1, keepdim=True),
    )[kind]


def predictor(**kwargs) -> dict:
    """Arguments as those of the layers' fixtures."""
    defaults = dict(basis=10, width=8, budget=13, score_threshold=None, basis_threshold=0.02, coef_topk=4)
    return defaults | dict(coef_threshold=0.0, share_proj=False) | kwargs


@pytest.mark.parametrize("name", ["op_attention", "op_attention_lv"])
def test_equals_published_layer(name):
    want = parity.load("sparsifiner", name)
    module = SparseAttention(48, 3, 50, name == "op_attention", None, predictor())
    module.load_state_dict({rename("." + key)[1:]: value for key, value in parity.weights(want).items()})
    x = parity.image(want).requires_grad_()
    y, left = module(x, None)
    (y * parity.seeded(1, y.shape)).sum().backward()
    record = module.record = module.predictor.record = Record(recon=False)
    again, _ = module(x, None)
    assert left is None and torch.equal(again, y)
    masked = record.attention * record.mask
    outputs = dict(out=y, grad_x=x.grad, masked_attn=masked / masked.sum(-1, keepdim=True), attn_mask=record.mask)
    outputs |= dict(unmasked_attn=record.attention, approx_attn=record.connectivity)
    for key, expected in want["outputs"].items():
        parity.assert_equal(key, outputs[key], expected)
    parity.assert_gradients(module, {"." + k: v for k, v in want["grads"].items()}, lambda key: rename(key)[1:])


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("op_mask_predictor", "whole"),
        ("op_mask_predictor", "kept"),  # that for tokens that differ from image to image, of which all may be there
        ("op_mask_predictor_train", "whole"),
        ("op_mask_predictor_train", "kept"),
        ("op_mask_predictor_recon", "whole"),
    ],
)
def test_equals_published_predictor(name, form):
    want = parity.load("sparsifiner", name)
    module = MaskPredictor(50, 16, **predictor())
    weights = {rename(".mask_predictor." + key): value for key, value in parity.weights(want).items()}
    module.load_state_dict({key.removeprefix(".predictor."): value for key, value in weights.items()})
    x = parity.image(want).requires_grad_()
    kept = torch.arange(50).expand(2, -1) if form == "kept" else None
    scores = module.scores(x[0], x[1], kept, recon=name.endswith("recon"))
    (scores * parity.seeded(1, scores.shape)).sum().backward()
    mask = unpack_mask(module.select(scores), 50)
    outputs = dict(approx_attn=scores, grad_x=x.grad, attn_mask=mask)
    for key in outputs:
        parity.assert_equal(key, outputs[key], want["outputs"][key])
    norms = {"predictor." + k: v for k, v in want["grads"].items()}
    parity.assert_gradients(module, norms, lambda key: rename(".mask_" + key).removeprefix(".predictor."))


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("sparsifiner_deit_t", 224, 201_216),
        ("sparsifiner_deit_b", 224, 201_216),
        ("sparsifiner_lvvit_s", 224, 268_288),
        ("sparsifiner_lvvit_m", 224, 335_360),
        ("sparsifiner_deit_s", 384, 1_379_328),
    ],
)
def test_parameters_of_the_predictors(name, size, count):
    model = timm.create_model(name, device="meta", img_size=size)
    assert sum(p.numel() for name, p in model.named_parameters() if ".predictor." in name) == count
    if size == 384:
        assert sum(p.numel() for p in model.parameters()) == 23_575_912


@pytest.mark.parametrize(("keep_rate", "sparse", "cut"), [(0.25, 92.1, 0.49), (0.1, 37.9, 0.64), (0.05, 19.9, 0.69)])
def test_macs_of_attention(keep_rate, sparse, cut):
    """DeiT-S, where the abstract has 48 to 69 % fewer; with a tenth of the basis filled, as training leaves it."""
    torch.set_default_dtype(torch.float32)
    model = timm.create_model("sparsifiner_deit_s", keep_rate=keep_rate, depth=2).eval()
    with torch.no_grad():
        for block in model.blocks:
            up = block.attn.predictor.up
            up.copy_(0.1 * (torch.rand_like(up) < 0.1))
    images = torch.randn(1, 3, 224, 224)
    macs = {part: 12 / 2 * count / 1e6 for part, count in model.attention_macs(images).items()}
    assert macs["dense"] == pytest.approx(357.7, rel=1e-3)
    assert macs["sparse"] == pytest.approx(sparse, rel=0.01)
    keys = sum(mask.sum().item() for mask in model.kept_keys(images))
    assert macs["sparse"] == pytest.approx(2 * 64 * keys * 12 / 2 / 1e6)
    assert 1 - (macs["sparse"] + macs["predictor"]) / macs["dense"] == pytest.approx(cut, abs=0.01)


@KINDS
@pytest.mark.parametrize("size", [(64, 64), (48, 112), (80, 32)], ids=str)
def test_maps_of_any_img_size(name, kwargs, size):
    model = small(name, features_only=True, out_indices=(0, 3), img_size=size, **kwargs).eval()
    for m in model(torch.randn(2, 3, *size)):
        assert m.shape == (2, 32, size[0] // 16, size[1] // 16) and m.isfinite().all()
    with pytest.raises(ValueError, match=f"images must be {size[0]} x {size[1]}, .*got 64 x 96"):
        model(torch.randn(1, 3, 64, 96))


def published_masking(model, x):
    """Logits with tokens masked, block by block as published: none is removed."""
    x, _ = model.embed(x)
    B, N, _ = x.shape
    alive = torch.ones(B, N, dtype=torch.bool)
    for block in model.blocks:
        attn = block.attn
        q, k, v = (t * alive[:, None, :, None] for t in attn.split(attn.qkv(block.norm1(x))))
        p = attn.predictor
        qc, kc = (proj(t) * alive[:, None, :, None] for proj, t in ((p.proj_q, q), (p.proj_k, k)))
        coef = (qc @ (kc.mT @ p.down) * attn.heads**-0.5)[:, :, 1:].softmax(-1)
        coef = coef * (coef >= coef.topk(p.coef_topk)[0][..., -1:])
        basis = p.up.mT.abs()
        scores = (coef @ (basis * (basis > p.basis_threshold))).masked_fill(~alive[:, None, None], -math.inf)
        budget = p.budget if alive.all() else min(p.budget, alive[0, 1:].sum().item())
        mask = F.pad(scores >= scores.topk(budget)[0][..., -1:], (0, 0, 1, 0), value=True)
        P = (q @ k.mT * attn.scale).masked_fill(~mask, -math.inf).softmax(-1)
        if attn.keep is not None:
            score = P[:, :, 0, 1:].mean(1).masked_fill(~alive[:, 1:], -math.inf)
            alive = F.pad(score >= score.topk(attn.keep)[0][:, -1:], (1, 0), value=True)
        x = x + attn.proj((P @ v).transpose(1, 2).flatten(2))
        x = (x + block.mlp(block.norm2(x))) * alive[..., None]
    return model.head(model.norm(x)), alive[:, 1:]


@pytest.mark.parametrize("kwargs", [dict(keep_rate=0.3), dict(keep_rate=0.9), dict(depth=9)])
@pytest.mark.parametrize("training", [False, True])
def test_removing_tokens_equals_masking_them(kwargs, training):
    model, x = small(token_keep_rate=0.5, **kwargs).train(training), torch.randn(3, 3, 64, 64)
    tokens = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda m, args, y: tokens.append(y.shape[1]))
    logits = model(x)
    depth = len(model.blocks)
    expected = [1 + math.ceil(16 * 0.5 ** sum(i >= depth * j // 4 for j in (1, 2, 3))) for i in range(depth)]
    assert tokens == expected
    masked, alive = published_masking(model, x)
    torch.testing.assert_close(logits, masked, rtol=1e-10, atol=1e-10)
    out = model.distill(x)
    assert torch.equal(out.alive, alive) and torch.equal(out.logits, logits)
    maps = model.forward_intermediates(x, [depth - 1], output_fmt="NLC", intermediates_only=True)[0]
    assert torch.equal(maps.ne(0).any(-1), alive)
    gone = out.features[~alive]
    torch.testing.assert_close(gone, model.norm.bias.expand_as(gone))


def test_a_query_keeps_no_more_keys_than_patches_are_left():
    out = small(keep_rate=0.9, token_keep_rate=0.5).distill(torch.randn(2, 3, 64, 64))
    for mask, left in zip(out.mask, (16, 16, 8, 4)):
        keys = mask.sum(-1)
        assert (keys[:, :, 0] == left + 1).all()
        assert set(keys[:, :, 1:].unique().tolist()) == ({16} if left == 16 else {0, left})


def test_keep_rate_of_each_block():
    rates = (1.0, 0.5, 0.25, 0.1)
    for mask, rate in zip(small(keep_rate=rates).kept_keys(torch.randn(2, 3, 64, 64)), rates):
        assert (mask[:, :, 0]).all() and (mask[:, :, 1:].sum(-1) == math.ceil(rate * 17)).all()


def test_thresholds():
    """Instead of the numbers of keys and of coefficients; a query that is left without a key gives 0."""
    model = small("sparsifiner_lvvit_s", score_threshold=0.1, coef_threshold=0.2)
    x = torch.randn(2, 3, 64, 64)
    out = model.eval().distill(x)
    for S, M in zip(out.connectivity, out.mask):
        assert torch.equal(M[:, :, 1:], S > 0.1) and 0.02 < M[:, :, 1:].double().mean() < 0.9
    bits = predictor(basis=2, width=2, budget=None, score_threshold=9.0, coef_topk=2)
    attn = SparseAttention(8, 2, 5, True, None, bits)
    y, _ = attn(torch.randn(1, 5, 8), None)
    assert torch.equal(y[:, 1:], attn.proj.bias.expand(1, 4, 8)) and not torch.equal(y[:, 0], attn.proj.bias[None])


def test_recon_form_is_the_dense_parent():
    """Of the first phase of training: attention is dense, no token goes, scores have signs."""
    parent = timm.create_model("deit_tiny_patch16_224", img_size=64, embed_dim=32, depth=4, num_heads=2, num_classes=7)
    model, x = small(token_keep_rate=0.5).train(), torch.randn(2, 3, 64, 64)
    weights = {
        k.replace("head.", "head.fc.").replace("patch_embed.", "stem."): v for k, v in parent.state_dict().items()
    }
    model.load_state_dict(weights, strict=False)
    out = model.distill(x, recon=True)
    torch.testing.assert_close(out.logits, parent(x), rtol=1e-12, atol=1e-12)
    assert out.alive.all() and all((S < 0).any() for S in out.connectivity)
    torch.testing.assert_close(out.attention[0].sum(-1), torch.ones(2, 2, 17))
    sum(S.sum() for S in out.connectivity).backward()
    assert all(p.grad.any() for key, p in model.named_parameters() if ".predictor." in key and "proj_k.bias" not in key)


PARENT = dict(img_size=64, embed_dim=32, depth=4, num_heads=2, num_classes=7)


@pytest.mark.parametrize("size", [64, (48, 80)], ids=str)
def test_begins_as_the_dense_deit(tmp_path, size):
    """timm's weights load by name; with every key kept it is the parent. The predictors keep their initial values."""
    parent = timm.create_model("deit_tiny_patch16_224", **PARENT).eval()
    model = load_file(
        tmp_path, {"model": parent.state_dict()}, "sparsifiner_deit_t", **(SMALL | dict(keep_rate=1.0, img_size=size))
    )
    assert all(0.01 < p.std() < 0.03 for key, p in model.named_parameters() if key.endswith((".up", ".down")))
    if size == 64:
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(model(x), parent(x), rtol=1e-12, atol=1e-12)
    else:
        grid = parent.pos_embed[:, 1:].mT.unflatten(2, (4, 4))
        grid = F.interpolate(grid, (3, 5), mode="bicubic", align_corners=False).flatten(2).mT
        assert torch.equal(model.pos_embed, torch.cat((parent.pos_embed[:, :1], grid), 1))


def test_begins_as_the_dense_lvvit(tmp_path):
    """Whose keys are the published ones without the predictors'."""
    source = small("sparsifiner_lvvit_s", keep_rate=1.0).eval()
    parent = {to_published(k): v for k, v in source.state_dict().items() if ".predictor." not in k}
    model = load_file(tmp_path, parent, "sparsifiner_lvvit_s", **SMALL, keep_rate=1.0)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), source(x), rtol=1e-12, atol=1e-12)
    assert not torch.equal(model.blocks[0].attn.predictor.up, source.blocks[0].attn.predictor.up)


def test_one_table_for_both_projections(tmp_path):
    model = small(share_proj=True).eval()
    table = SMALL["depth"] * 17 * 8
    assert sum(p.numel() for p in small().parameters()) - sum(p.numel() for p in model.parameters()) == table
    weights = small().state_dict()
    for key in [key for key in weights if key.endswith(".up")]:
        weights[key] = weights[key.replace(".up", ".down")]
    two, one = (load_file(tmp_path, weights, "sparsifiner_deit_t", **SMALL, share_proj=b) for b in (False, True))
    for kwargs in ({}, dict(token_keep_rate=0.5)):
        two, one = (
            load_file(tmp_path, weights, "sparsifiner_deit_t", **SMALL, **kwargs, share_proj=b) for b in (False, True)
        )
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(two(x), one(x))
    with pytest.raises(ValueError, match=r"needs weights with two equal tables, but .*down and its up "):
        load_file(tmp_path, small().state_dict(), "sparsifiner_deit_t", **SMALL, share_proj=True)


def test_weights_of_another_size_are_refused_in_one_sentence(tmp_path):
    sentence = "for 37 tokens and cannot be resized to this model's 17: set img_size to theirs"
    with pytest.raises(ValueError, match=sentence):
        load_file(tmp_path, small(img_size=96).state_dict(), "sparsifiner_deit_t", **SMALL)


@KINDS
def test_gradients_of_all_but_the_predictors(name, kwargs):
    """The logits' reach none of those, in training LV-ViT's neither the patches' classifier."""
    model = small(name, **kwargs)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for key, p in model.named_parameters():
        assert (p.grad is None) == (".predictor." in key or key.startswith("aux.")), key
    model.zero_grad()
    out = model.distill(torch.randn(2, 3, 64, 64))
    sum(t.square().sum() for t in (out.logits, out.features, *out.connectivity)).backward()
    assert all(p.grad is not None for p in model.parameters())


@KINDS
def test_pruned_model_gives_the_same_maps(name, kwargs):
    x, model = torch.randn(1, 3, 64, 64), small(name, **kwargs).eval()
    want, expected = model.forward_intermediates(x, [0, 2], norm=True, intermediates_only=True), model(x)
    assert model.prune_intermediate_layers([3], prune_head=False) == [3] and torch.equal(model(x), expected)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2] and len(model.blocks) == 3
    got = model.forward_intermediates(x, [0, 2], norm=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    model.train().forward_features(x).sum().backward()
    assert all(p.grad is not None for key, p in model.named_parameters() if ".predictor." not in key)


def test_heads():
    x = torch.randn(2, 3, 64, 64)
    for name in ("sparsifiner_deit_t", "sparsifiner_lvvit_s"):
        model = small(name).eval()
        tokens = model.forward_features(x)
        assert tokens.shape == (2, 17, 32)
        assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
        expected = model.head.fc(tokens[:, 0])
        if name == "sparsifiner_lvvit_s":
            torch.testing.assert_close(model(x), expected + 0.5 * model.aux(tokens[:, 1:]).max(1)[0])
            torch.testing.assert_close(model.distill(x).logits, expected)  # as the published teacher
            torch.testing.assert_close(model.train().forward_head(tokens), expected)
            model.eval()
        else:
            torch.testing.assert_close(model(x), expected)
        model.reset_classifier(3, "avg")
        assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1))
        assert model(x).shape == (2, 3)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), tokens)


@KINDS
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripts(name, kwargs):
    model, x = small(name, **kwargs).eval(), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-10, atol=1e-10)


def test_predictors_learn_to_reconstruct_attention():
    """As in the first phase of the published training: then they choose better keys than before."""
    torch.set_default_dtype(torch.float32)
    model, x = small(), torch.randn(8, 3, 64, 64)
    predictors = [p for key, p in model.named_parameters() if ".predictor." in key]
    optimizer, losses = torch.optim.AdamW(predictors, 1e-2), []
    for _ in range(15):
        out = model.distill(x, recon=True)
        losses.append(sum((S - P[:, :, 1:].detach()).square().sum() for S, P in zip(out.connectivity, out.attention)))
        optimizer.zero_grad()
        losses[-1].backward(inputs=predictors)
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
