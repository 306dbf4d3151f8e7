"""How much memory a training needs, from the model's config alone: no weight is read, none is made.

The model is built without storage, with what is trained of it; one forward pass of it is run on tensors without storage, and
what autograd would keep for the backward pass is counted. The formula stands in docs/plan.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from llmtune.config.train import AdapterConfig, TrainableConfig
from llmtune.model import adapters, freeze, infer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Sharding = Literal["none", "ddp", "fsdp2", "zero3"]
ADAMW_STATE = 2.0
"""Numbers that AdamW keeps for a trained one, each in its format."""
QUANTISED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes a weight: NF4 has a scale of a byte for 64 weights and one of four for 256 of those; int8 one a row, next to nothing."""
HOLES = 0.4
"""On a CPU: what glibc's heap grows beyond the activations in it, as a share of them, unless freed gradients fill it (measured)."""
MAPPED = 32 * 2**20
"""glibc gives larger pieces back to the system as soon as they are freed."""
KERNELS = 0.1 * 2**30
"""On a CPU: what oneDNN and the threads hold once they have worked (measured)."""
ZERO3_LIVE, ZERO3_BUCKET = 1e9, 5e8
"""DeepSpeed's defaults: parameters gathered at a time (stage3_max_live_parameters), elements of a bucket of gradients."""


@dataclass(frozen=True)
class Batch:
    """The micro batch that needs most: rows of `length` tokens, padding included.

    supervised: its tokens with a label. positions: columns in which some row has one, where the head runs.
    """

    rows: int
    length: int
    supervised: int
    positions: int


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps from one forward pass: a part whatever the rows, and a part for each row."""

    fixed: float
    row: float
    inputs: float
    """Of the row's part: what the blocks begin with, all that is kept of them under activation checkpointing."""
    block: float
    """Of the row's part: the largest block's, which checkpointing computes again and then holds."""
    outside: float
    """Of the row's part: what lies outside of the blocks."""

    def bytes(self, rows: int, *, checkpointing: bool) -> float:
        return self.fixed + rows * (self.inputs + self.block + self.outside if checkpointing else self.row)


@dataclass(frozen=True)
class Need:
    """Bytes on one device when it needs most."""

    weights: float
    """What is not trained."""
    trained: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    """Logits, their softmax and their gradients, and the head's own gradient."""
    workspace: float
    """What kernels hold, a quantised layer while it is unpacked, and the parts of a sharded model that are whole while used."""
    process: float
    """The process itself: interpreter, libraries, rows."""
    accumulates: bool

    @property
    def peak(self) -> float:
        """Without accumulation a gradient comes as the activations that it was made from go: the larger of the two counts."""
        lasting = self.weights + self.trained + self.optimizer + self.workspace + self.process
        passing = self.activations + self.loss
        return lasting + (self.gradients + passing if self.accumulates else max(self.gradients, passing))


def sketch(
    config: PretrainedConfig,
    adapter: AdapterConfig | None,
    trainable: TrainableConfig | None,
    *,
    compute: str,
    adapter_dtype: str,
    trust_remote_code: bool = False,
) -> Any:
    """The model of a run without storage: every parameter with its shape, its dtype, and whether it is trained.

    compute: the dtype of frozen weights. Raises ConfigError as the run would, for fields that PEFT or the model refuses.
    """
    from transformers import AutoModelForCausalLM

    frozen = getattr(torch, compute)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=frozen if adapter else torch.float32, trust_remote_code=trust_remote_code
        )
        if adapter is not None:
            model = adapters.wrap(model, adapter, steps=1000)  # AdaLoRA wants to know
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(getattr(torch, adapter_dtype))
        elif trainable is not None:
            freeze.freeze(model, trainable, compute)
    return model


def count(model: Any) -> tuple[int, int]:
    """Parameters, and those of them that are trained; a tied one counts once."""
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad)


def kept(model: Any, length: int, *, mixed: bool) -> Kept:
    """What autograd keeps of rows of `length` tokens. mixed: float32 weights under bfloat16 autocast."""
    one, two = (_trace(model, rows, length, mixed) for rows in (1, 2))
    return Kept(
        fixed=2 * one.total - two.total,
        row=two.total - one.total,
        inputs=two.inputs - one.inputs,
        block=max((more - less for less, more in zip(one.blocks, two.blocks, strict=True)), default=0.0),
        outside=two.outside - one.outside,
    )


@dataclass
class _Trace:
    outside: float
    blocks: list[float]
    inputs: float

    @property
    def total(self) -> float:
        return self.outside + sum(self.blocks)


def _trace(model: Any, rows: int, length: int, mixed: bool) -> _Trace:
    """One forward pass on fake tensors, which have a shape and no storage; on a GPU the same kernels keep the same."""
    with FakeTensorMode(allow_non_fake_inputs=True), _stored(model) as own:
        blocks = _blocks(model)
        found, now = _Trace(0.0, [0.0] * len(blocks), 0.0), [-1]
        seen = set(own)

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                holders.append(storage)  # or its address would be given to another
                if now[0] < 0:
                    found.outside += storage.nbytes()
                else:
                    found.blocks[now[0]] += storage.nbytes()
            return tensor

        def enter(index: int, _module: Any, args: Any, kwargs: Any) -> None:
            now[0] = index
            hidden = args[0] if args else kwargs["hidden_states"]
            found.inputs += hidden.untyped_storage().nbytes()

        def leave(*_: Any) -> None:
            now[0] = -1

        holders: list[Any] = []
        hooks = [block.register_forward_pre_hook(partial(enter, i), with_kwargs=True) for i, block in enumerate(blocks)]
        hooks += [block.register_forward_hook(leave) for block in blocks]
        ids = torch.zeros(rows, length, dtype=torch.long)
        keep = {"logits_to_keep": 1} if infer._can_keep(model) else {}
        model.train()
        try:
            with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep)
        finally:
            for hook in hooks:
                hook.remove()
    return found


@contextlib.contextmanager
def _stored(model: Any) -> Iterator[set[int]]:
    """Give the parameters of a sketch fake tensors for the time of a trace; yields the addresses of what they stand for."""
    made: dict[int, Any] = {}
    before = [(module, module._parameters.copy(), module._buffers.copy()) for module in model.modules()]
    for module, parameters, buffers in before:
        for name, given in parameters.items():
            if given is not None:
                like = made.get(id(given))
                if like is None:
                    like = torch.nn.Parameter(torch.empty(given.shape, dtype=given.dtype), given.requires_grad)
                made[id(given)] = module._parameters[name] = like
        for name, given in buffers.items():
            if given is not None:
                made[id(given)] = module._buffers[name] = torch.empty(given.shape, dtype=given.dtype)
    try:
        yield {tensor.untyped_storage()._cdata for tensor in made.values()}
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _blocks(model: Any) -> list[Any]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return list(inner.get_submodule(freeze.blocks(inner)[0]))


def need(
    model: Any,
    held: Kept,
    batch: Batch,
    *,
    checkpointing: bool,
    accumulates: bool,
    compute: str,
    on_cpu: bool,
    quantize: str | None = None,
    rounded: bool = False,
    state: float = ADAMW_STATE,
    sharding: Sharding = "none",
    devices: int = 1,
    process: float = 0.0,
) -> Need:
    """What a device needs. state: numbers that the optimizer keeps for a trained one, in its format.

    rounded: frozen weights were loaded in float32 before they became `compute`.
    """
    parameters = list(model.parameters())
    trained = float(sum(p.numel() * p.element_size() for p in parameters if p.requires_grad))
    weights = float(sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad))
    gradients, workspace, width = trained, 0.0, getattr(torch, compute).itemsize
    if quantize:
        layers = _quantised_layers(model)
        weights += sum(layer.weight.numel() * (QUANTISED[quantize] - layer.weight.element_size()) for layer in layers)
        workspace += width * max(layer.weight.numel() for layer in layers)
        if on_cpu:  # the checkpoint stays mapped while its embeddings are used as they lie there, and its pages count
            workspace += width * sum(layer.weight.numel() for layer in layers)
    if sharding == "ddp" and devices > 1:
        gradients *= 2  # its buckets hold a second copy
    elif sharding != "none" and devices > 1:
        workspace += _gathered(model, sharding, width)
        held = replace(held, fixed=0.0)  # what is gathered is in the dtype of the arithmetic already
        weights, trained, gradients = weights / devices, trained / devices, gradients / devices
    activations = held.bytes(batch.rows, checkpointing=checkpointing)
    if on_cpu:
        holes = HOLES * (activations - held.fixed)
        if rounded:
            wide = [4 * p.numel() for p in parameters if not p.requires_grad and p.element_size() < 4]
            workspace += sum(size for size in wide if size < MAPPED)
        workspace += KERNELS + (holes if accumulates else max(0.0, holes - gradients))
    return Need(
        weights=weights,
        trained=trained,
        gradients=gradients,
        optimizer=state * trained,
        activations=activations,
        loss=_loss(model, batch, width) if on_cpu else 0.0,  # TRL's kernel makes no logits
        workspace=workspace,
        process=process,
        accumulates=accumulates,
    )


def _loss(model: Any, batch: Batch, width: int) -> float:
    """Logits in the dtype of the arithmetic, picked where there is a label, in float32, their softmax and its gradient."""
    vocabulary = model.config.get_text_config().vocab_size
    logits, picked = batch.rows * batch.positions * vocabulary * width, batch.supervised * vocabulary
    forward = logits + picked * width + (picked * 4 if width < 4 else 0) + picked * 4
    return float(max(forward, 3 * picked * 4)) + _head_gradient(model, width)


def _head_gradient(model: Any, width: int) -> float:
    """The head's gradient is the first to come, while all activations are still held; under autocast in both formats."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or not weight.requires_grad:
        return 0.0
    return float(weight.numel() * (weight.element_size() + (width if width < weight.element_size() else 0)))


def _quantised_layers(model: Any) -> list[Any]:
    """Frozen linear layers, which bitsandbytes quantises; it leaves the head as it is."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return [layer for layer in layers if not layer.weight.requires_grad]


def _gathered(model: Any, sharding: Sharding, width: int) -> float:
    """FSDP2 gathers a block while the one before it computes, and what lies outside of the blocks. ZeRO-3: its defaults."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in _blocks(model)]
    total = count(model)[0]
    if sharding == "fsdp2":
        return float(width * (total - sum(blocks) + 2 * max(blocks)))
    return width * (min(total, ZERO3_LIVE) + min(total, ZERO3_BUCKET))
