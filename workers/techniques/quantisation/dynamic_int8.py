"""Dynamic int8: linear layers hold int8 weights, activations are quantised as they come, int8 product on the CPU.

Source: Jacob et al., arXiv 1712.05877, section 2 (affine quantisation, integer matrix product); PyTorch's eager
dynamic quantisation, of which this uses the kernel ``quantized::linear_dynamic``.
Differs from the paper: no calibration and no quantisation-aware training; activation ranges are taken per call and per
tensor, so a result depends on what else is in the batch. Weights are symmetric, scale = max |w| / 127.5. Activations
use 7 of 8 bits (``reduce_range``), as PyTorch's own module: without it CPUs that lack VNNI overflow.

Costs: the activation's rounding, small for ViTs. Saves: about 3.8x of the file with all linear layers converted (the
patch embedding stays float32), and CPU time where the layers are wide. Inside the layer the product is int8 with int32
sums, scaled to float32; input and output have the model's type.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.quantisation.shared_affine import KernelLinear, linears, symmetric_int8
from workers.techniques.quantisation.shared_packed_embeddings import pack_embeddings, rebuild_embeddings
from workers.techniques.quantisation.weight_only import int8_table, packed, packed_later
from workers.techniques.record import Applied, ModelInfo, Rule, Surroundings, Technique, choice


@dataclass(frozen=True)
class Config:
    """How weights share scales, and whether the head is left alone."""

    granularity: str = choice(
        "per_channel", ("per_channel", "per_tensor"), doc="one scale a weight row, or one a layer"
    )
    skip_head: bool = choice(False, (False, True), search=(False,), doc="leave the classifier heads unquantised")
    embeddings: bool = choice(
        True, (True, False), search=(True,), doc="pack a text encoder's word embeddings as well, 8 bits a row"
    )


class DynamicInt8Linear(KernelLinear):
    """x W^T + b with int8 W: ``weight`` (O, I) int8, ``scale`` (O,) or () float32, ``bias`` (O,) or None."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    arithmetic = "int8"  # see workers.artefact.parity

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def pack_for_kernel(self) -> Any:
        """Returns the packed weight and bias of ``quantized::linear_prepack``."""
        weight = self.weight.contiguous()
        with warnings.catch_warnings():
            # PyTorch deprecates quantised tensors but offers the kernel no other way in.
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel")
            if self.scale.ndim:
                zeros = torch.zeros(self.out_features, dtype=torch.long)
                make = torch._make_per_channel_quantized_tensor
                q = make(weight, self.scale.double(), zeros, 0)
            else:
                q = torch._make_per_tensor_quantized_tensor(weight, self.scale.item(), 0)
        bias = None if self.bias is None else self.bias.float()
        return torch.ops.quantized.linear_prepack(q, bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) any floating type -> (..., O) same type."""
        y: Tensor = torch.ops.quantized.linear_dynamic(x.float(), self.packing, reduce_range=True)
        return y.to(x.dtype)


def _check(info: ModelInfo, config: Config) -> str | None:
    """Returns why the kernel cannot run on this device, or None."""
    if info.device != "cpu":
        return f"the dynamic int8 kernel runs on CPU only, not on {info.device}; use weight_only there"
    if torch.backends.quantized.engine == "none":
        return "this PyTorch was built without a quantised engine"
    return None


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Replaces the linear layers in place."""
    found = linears(model, skip_head=config.skip_head)
    for name, linear in found.items():
        weight, scale = symmetric_int8(linear.weight, per_channel=config.granularity == "per_channel")
        bias = None if linear.bias is None else linear.bias.detach().clone()
        model.set_submodule(name, DynamicInt8Linear(weight, scale, bias))
    names = list(found)
    tables = pack_embeddings(model, int8_table) if config.embeddings else []
    return Applied(model, {"granularity": config.granularity, "linears": names, **packed(tables)}, names + tables)


def _foresee(model: nn.Module, config: Config, surroundings: Surroundings) -> dict[str, Any]:
    names = list(linears(model, skip_head=config.skip_head))
    return {"granularity": config.granularity, "linears": names, **packed_later(model, config)}


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Replaces the same layers of a skeleton by layers without values."""
    for name in resolved["linears"]:
        old: Any = model.get_submodule(name)
        weight = torch.empty(old.weight.shape, dtype=torch.int8, device="meta")
        scale = torch.empty(weight.shape[:1] if resolved["granularity"] == "per_channel" else (), device="meta")
        bias = None if old.bias is None else torch.empty(weight.shape[:1], device="meta")
        model.set_submodule(name, DynamicInt8Linear(weight, scale, bias))
    rebuild_embeddings(model, resolved.get("embeddings", ()), int8_table)
    return model


TECHNIQUE = Technique(
    name="dynamic_int8",
    family="quantisation",
    version=1,
    Config=Config,
    stage="conversion",
    apply=_apply,
    rebuild=_rebuild,
    foresee=_foresee,
    check=_check,
    models=("timm", "vilt", "meter"),
    rules=(Rule(("precision",), "forbidden", "the dynamic int8 kernel takes float32 activations only"),),
    not_on={"cuda": "the dynamic int8 kernel runs on the CPU only"},
    source="Jacob et al. 2018, arXiv 1712.05877, section 2; PyTorch eager dynamic quantisation",
)
