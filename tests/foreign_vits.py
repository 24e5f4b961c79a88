"""Small ViTs as strangers write them, each with names and a forward of its own, for tests that load their weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

SIDE, PATCH, WIDTH, DEPTH, HEADS, HIDDEN, CLASSES = 16, 4, 32, 2, 2, 64, 10
TOKENS = (SIDE // PATCH) ** 2
CREATE = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "patch": PATCH, "mlp_ratio": HIDDEN / WIDTH}
"""The section ``model.create`` of a study for any of them."""


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Returns softmax attention of (B, N, C) by its formula."""

    def split(t: Tensor) -> Tensor:
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)

    weights = (split(q) @ split(k).transpose(-2, -1) / math.sqrt(q.shape[-1] // heads)).softmax(-1)
    return (weights @ split(v)).transpose(1, 2).flatten(2)


class _Norm(nn.Module):
    """A LayerNorm that calls its parameters alpha and beta."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.randn(WIDTH) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (WIDTH,), self.alpha, self.beta, 1e-5)


class _SeparateAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(attend(self.query(x), self.key(x), self.value(x), HEADS))


class _SeparateBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_att, self.attention = _Norm(), _SeparateAttention()
        self.norm_mlp, self.dense1, self.dense2 = _Norm(), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_att(x))
        return x + self.dense2(nn.functional.gelu(self.dense1(self.norm_mlp(x)), approximate="tanh"))


class Separate(nn.Module):
    """``blocks.N.attention.query`` and so on; norms with alpha and beta; tanh GELU; eps 1e-5."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.position_embedding = nn.Parameter(torch.randn(TOKENS + 1, WIDTH))
        self.blocks = nn.ModuleList(_SeparateBlock() for _ in range(DEPTH))
        self.final_norm, self.classifier = _Norm(), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.position_embedding
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.final_norm(x)[:, 0])


SEPARATE_MAP = {
    r"class_embedding": "cls_token",
    r"position_embedding": "pos_embed",
    r"patches\.(weight|bias)": r"patch_embed.proj.\1",
    r"blocks\.(\d+)\.attention\.(query|key|value)\.(weight|bias)": r"blocks.\1.attn.qkv{\2}.\3",
    r"blocks\.(\d+)\.attention\.out\.(weight|bias)": r"blocks.\1.attn.proj.\2",
    r"blocks\.(\d+)\.norm_att\.alpha": r"blocks.\1.norm1.weight",
    r"blocks\.(\d+)\.norm_att\.beta": r"blocks.\1.norm1.bias",
    r"blocks\.(\d+)\.norm_mlp\.alpha": r"blocks.\1.norm2.weight",
    r"blocks\.(\d+)\.norm_mlp\.beta": r"blocks.\1.norm2.bias",
    r"blocks\.(\d+)\.dense(1|2)\.(weight|bias)": r"blocks.\1.mlp.fc\2.\3",
    r"final_norm\.alpha": "norm.weight",
    r"final_norm\.beta": "norm.bias",
    r"classifier\.(weight|bias)": r"head.\1",
}
SEPARATE_OPTIONS = {"norm_eps": 1e-5, "act": "gelu_tanh"}


class _PreNorm(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(WIDTH), fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class _FlatAttention(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(WIDTH, 3 * HEADS * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(HEADS * head_dim, WIDTH), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(attend(*self.to_qkv(x).chunk(3, dim=-1), HEADS))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(0.0), nn.Linear(HIDDEN, WIDTH), nn.Dropout(0.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Layers(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        pairs = ([_PreNorm(_FlatAttention(head_dim)), _PreNorm(_Net())] for _ in range(DEPTH))
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for attention, mlp in self.layers:
            x = attention(x) + x
            x = mlp(x) + x
        return x


class FlatPatches(nn.Module):
    """Names and arithmetic of vit-pytorch up to 0.40: ``transformer.layers.N.0.fn.to_qkv``, patches flattened by row, column, channel."""

    def __init__(self, head_dim: int = WIDTH // HEADS) -> None:
        super().__init__()
        self.to_patch_embedding = nn.Sequential(nn.Identity(), nn.Linear(PATCH * PATCH * 3, WIDTH))
        self.pos_embedding = nn.Parameter(torch.randn(1, TOKENS + 1, WIDTH))
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.transformer = _Layers(head_dim)
        self.mlp_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        rows = images.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # (B, C, h, p1, w, p2)
        x = self.to_patch_embedding(rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], 1) + self.pos_embedding
        return self.mlp_head(self.transformer(x)[:, 0])


FLAT_MAP = {
    r"pos_embedding": "pos_embed",
    r"to_patch_embedding\.1\.(weight|bias)": r"patch_embed.proj{p1 p2 c}.\1",
    r"transformer\.layers\.(\d+)\.0\.norm\.(weight|bias)": r"blocks.\1.norm1.\2",
    r"transformer\.layers\.(\d+)\.0\.fn\.to_qkv\.weight": r"blocks.\1.attn.qkv.weight",
    r"transformer\.layers\.(\d+)\.0\.fn\.to_out\.0\.(weight|bias)": r"blocks.\1.attn.proj.\2",
    r"transformer\.layers\.(\d+)\.1\.norm\.(weight|bias)": r"blocks.\1.norm2.\2",
    r"transformer\.layers\.(\d+)\.1\.fn\.net\.0\.(weight|bias)": r"blocks.\1.mlp.fc1.\2",
    r"transformer\.layers\.(\d+)\.1\.fn\.net\.3\.(weight|bias)": r"blocks.\1.mlp.fc2.\2",
    r"mlp_head\.0\.(weight|bias)": r"norm.\1",
    r"mlp_head\.1\.(weight|bias)": r"head.\1",
}
FLAT_OPTIONS = {"norm_eps": 1e-5, "qkv_bias": False}


def torchvision_vit() -> nn.Module:
    """Returns torchvision's own, whose head is drawn like the rest: it begins with zeros."""
    from torchvision.models import VisionTransformer

    model = VisionTransformer(SIDE, PATCH, DEPTH, HEADS, WIDTH, HIDDEN, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight)
    return model


TORCHVISION_MAP = {
    r"class_token": "cls_token",
    r"encoder\.pos_embedding": "pos_embed",
    r"conv_proj\.(weight|bias)": r"patch_embed.proj.\1",
    r"encoder\.layers\.encoder_layer_(\d+)\.ln_(1|2)\.(weight|bias)": r"blocks.\1.norm\2.\3",
    r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(weight|bias)": r"blocks.\1.attn.qkv.\2",
    r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(weight|bias)": r"blocks.\1.attn.proj.\2",
    r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.0\.(weight|bias)": r"blocks.\1.mlp.fc1.\2",
    r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.3\.(weight|bias)": r"blocks.\1.mlp.fc2.\2",
    r"encoder\.ln\.(weight|bias)": r"norm.\1",
    r"heads\.head\.(weight|bias)": r"head.\1",
}


def transformers_vit(kind: str, **config: Any) -> Any:
    """Returns a model of transformers', drawn: ``ViTForImageClassification`` and its kin."""
    import transformers

    made = transformers.DeiTConfig if kind.startswith("DeiT") else transformers.ViTConfig
    shape = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": HIDDEN,
    }
    model = getattr(transformers, kind)(
        made(**{**shape, "image_size": SIDE, "patch_size": PATCH, "num_labels": CLASSES, **config})
    )
    return drawn(model)


def drawn(model: nn.Module) -> nn.Module:
    """Returns the model in eval mode with weights far enough from nothing that every one of them shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            near_one = tensor.ndim == 1 and not name.endswith(("bias", "beta", "embedding"))
            tensor.copy_(1 + noise / 9 if near_one else noise / 4)
    return model.eval()
