"""`llmtune plan`: what a run would train, how long, in how much memory, before any weight is loaded; and what would fit."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from pydantic import ValidationError

from llmtune import ranks
from llmtune.config import Recorded
from llmtune.config.sft import SftConfig
from llmtune.config.train import AdapterConfig, TrainableConfig, require_divisible
from llmtune.data.tokens import IGNORED
from llmtune.errors import ConfigError
from llmtune.model import adapters, load, memory, quantised
from llmtune.model.memory import Batch, Need
from llmtune.training import arguments, group, optim, rows
from llmtune.training.rows import Split

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GB = 2**30
ROOM = 0.9
"""Share of what is free that a configuration may need: a prediction is not a measurement."""
CONTEXT = 1.0 * GB
"""On a GPU, beside torch's tensors: the CUDA context and communication buffers. An estimate."""


@dataclass(frozen=True)
class Setting:
    """What of a run decides its memory, as the levers move it; each field by the key that sets it."""

    micro_batch_size: int
    activation_checkpointing: bool
    quantize: str | None


class Run:
    """A phase of a run file priced: the model without storage, its rows, and the memory that any setting of the levers needs."""

    def __init__(self, config: SftConfig, whole: SftConfig, place: object) -> None:
        self.config, self.whole, self.place, view = config, whole, place, Recorded(config)
        require_divisible(config.train, ranks.world_size(), place)
        group.check(view, place)
        self.device = load.choose_device(config.model.device)
        self.state = optim.check(config.train, self.device, place) / 4  # it is tried on float32 weights
        load.require_attention(config.model.attention, self.device, place)
        self.base = load.find(
            config.model.name,
            quantize=config.model.quantize,
            trust_remote_code=config.model.trust_remote_code,
        )
        quantised.require_trainable(self.base, self.device, config.adapter.method if config.adapter else None, place)
        tokenizer = load.load_tokenizer(self.base, trust_remote_code=config.model.trust_remote_code)
        with tempfile.TemporaryDirectory() as folder:
            self.train, self.validation = rows.encode_splits(view.data, tokenizer, Path(folder), place)
            self.lengths, self.supervised, self.labelled = _lengths(self.train)
        self.compute = load.choose_dtype(config.model.dtype, self.device)
        self.model = self._sketch()
        self.parameters, self.trained = memory.count(self.model)
        trained = {p.dtype for p in self.model.parameters() if p.requires_grad}
        self.mixed = self.compute == "bfloat16" and torch.float32 in trained
        self.process = resident() if self.device == "cpu" else 0.0
        self._kept: dict[int, memory.Kept] = {}

    def _sketch(self) -> Any:
        from transformers import AutoConfig

        config, remote = self.config, self.config.model.trust_remote_code
        shape = AutoConfig.from_pretrained(self.base.folder, trust_remote_code=remote)
        limit = getattr(shape.get_text_config(), "max_position_embeddings", None)
        if limit and config.data.max_length > limit:
            raise ConfigError(
                self.place,
                f"data.max_length: {config.data.max_length} is more than the {limit} positions of the model",
            )
        wide = config.train.adapter_dtype == "float32" or (
            config.train.adapter_dtype == "auto" and config.train.learning_rate < adapters.BF16_LEARNING_RATE
        )
        return memory.sketch(
            shape,
            config.adapter,
            config.trainable,
            compute=self.compute,
            adapter_dtype="float32" if wide else self.compute,
            trust_remote_code=remote,
        )

    @property
    def setting(self) -> Setting:
        train = self.config.train
        return Setting(train.micro_batch_size, train.activation_checkpointing, self.base.quantised)

    @property
    def steps(self) -> int:
        return arguments.total_steps(Recorded(self.config), len(self.lengths))

    @property
    def tokens(self) -> int:
        """Tokens that the run trains on, padding not counted."""
        if self.config.train.max_steps is None:
            return round(sum(self.lengths) * float(self.config.train.epochs or 0))
        return round(np.mean(self.lengths) * self.config.train.max_steps * self.config.train.batch_size)

    def batch(self, micro: int) -> Batch:
        """The micro batch of the longest rows; packed ones lie end to end in a single row."""
        longest = sorted(range(len(self.lengths)), key=lambda row: -self.lengths[row])[:micro]
        columns = np.zeros(self.lengths[longest[0]], dtype=bool)
        for row in longest:
            columns[: self.lengths[row]] |= self.labelled[row]
        supervised, length = sum(self.supervised[row] for row in longest), self.lengths[longest[0]]
        if self.config.data.packing:
            return Batch(1, length * len(longest), supervised, supervised)
        return Batch(len(longest), length, supervised, int(columns.sum()))

    def need(self, setting: Setting, sharding: memory.Sharding = "none", devices: int = 1) -> Need:
        batch = self.batch(setting.micro_batch_size)
        if batch.length not in self._kept:
            self._kept[batch.length] = memory.kept(self.model, batch.length, mixed=self.mixed)
        world = max(devices, ranks.world_size())
        return memory.need(
            self.model,
            self._kept[batch.length],
            batch,
            checkpointing=setting.activation_checkpointing,
            accumulates=self.config.train.batch_size > setting.micro_batch_size * world,
            compute=self.compute,
            on_cpu=self.device == "cpu",
            quantize=setting.quantize,
            rounded=self.config.trainable is not None,
            state=self.state,
            sharding=sharding,
            devices=devices,
            process=self.process,
        )

    def levers(self) -> Iterator[tuple[list[str], Need]]:
        """Configurations from the run's own to the one that needs least: overrides, and what they need. One lever after another."""
        start = self.setting
        size, micro = self.config.train.batch_size, start.micro_batch_size
        now, said = start, list[str]()
        yield said, self.need(now)
        for smaller in (n for n in range(micro - 1, 0, -1) if size % (n * ranks.world_size()) == 0):
            now, said = replace(start, micro_batch_size=smaller), [f"train.micro_batch_size={smaller}"]
            yield said, self.need(now)
        if not now.activation_checkpointing and self._takes("train", activation_checkpointing=True):
            now, said = replace(now, activation_checkpointing=True), [*said, "train.activation_checkpointing=true"]
            yield said, self.need(now)
        if now.quantize is None and self._takes("model", quantize="nf4"):
            now, said = replace(now, quantize="nf4"), [*said, "model.quantize=nf4"]
            yield said, self.need(now)
        if self.device != "cpu":
            for devices in (n for n in (2, 4, 8) if size % n == 0 and now.quantize is None):
                yield (
                    [*said, f"# on {devices} GPUs, by configs/accelerate/fsdp2.yaml"],
                    self.need(now, "fsdp2", devices),
                )

    def _takes(self, section: str, **lever: object) -> bool:
        """Whether the run file may say so, with all else that it says."""
        raw = self.whole.model_dump(exclude_unset=True)
        try:
            SftConfig.model_validate(raw | {section: raw[section] | lever})
        except ValidationError:
            return False
        return True

    def flops(self) -> float:
        """Floating point operations of the run: two a weight and token forward, two for what passes back, two for each trained weight."""
        table = self.model.get_input_embeddings().weight
        tied = self.model.get_output_embeddings().weight is table
        weights = self.parameters - (0 if tied else table.numel())
        trained = min(self.trained, weights)
        again = 2 if self.config.train.activation_checkpointing else 0
        return float(self.tokens * ((4 + again) * weights + 2 * trained))


def _lengths(split: Split) -> tuple[list[int], list[int], dict[int, Any]]:
    """Tokens of each row, those of them that are supervised, and for the longest rows which."""
    columns = split.rows.data.column("labels").combine_chunks()
    flat = pc.list_flatten(columns).to_numpy(zero_copy_only=False) != IGNORED
    lengths = pc.list_value_length(columns).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    supervised = np.add.reduceat(flat, starts)
    longest = np.argsort(-lengths, kind="stable")[:4096]
    return lengths.tolist(), supervised.tolist(), {int(row): flat[starts[row] : ends[row]] for row in longest}


def of_run(config: SftConfig, place: object, earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan of a run file. earlier: runs on this machine (`run`, `base`, `method`, `tokens_per_s`), newest first.

    Of two phases it is that of the first, with that of the second under `second_phase`. Raises what `sft` would raise before it
    loads weights.
    """
    first, *second = (_of_phase(phase, config, place, earlier) for phase in config.phases())
    return first | ({"second_phase": second[0]} if second else {})


def _of_phase(config: SftConfig, whole: SftConfig, place: object, earlier: list[dict[str, Any]]) -> dict[str, Any]:
    run = Run(config, whole, place)
    free = available(run.device)
    tried = [(overrides, need.peak) for overrides, need in run.levers()]
    fitting = next(((overrides, peak) for overrides, peak in tried if peak <= ROOM * free), None)
    need, setting, train = run.need(run.setting), run.setting, config.train
    world = ranks.world_size()
    return {
        "model": {
            "name": config.model.name,
            "parameters": run.parameters,
            "trained": run.trained,
            "dtype": run.compute,
            "quantize": setting.quantize,
            "method": config.adapter.method if config.adapter else "partial" if config.trainable else "full",
        },
        "data": {
            "rows": run.train.counts.rows,
            "tokens": run.train.counts.tokens,
            "supervised_tokens": run.train.counts.supervised_tokens,
            "longest": max(run.lengths),
        },
        "run": {
            "steps": run.steps,
            "tokens": run.tokens,
            "batch_size": train.batch_size,
            "micro_batch_size": train.micro_batch_size,
            "processes": world,
            "accumulation": train.batch_size // (train.micro_batch_size * world),
            "flops": run.flops(),
            "seconds": None,
            "basis": None,
        }
        | _measured(earlier, config, run),
        "batch": asdict(run.batch(train.micro_batch_size)),
        "memory": {**{k: v for k, v in asdict(need).items() if k != "accumulates"}, "peak": need.peak},
        "device": {"kind": run.device, "available": free, "fits": need.peak <= ROOM * free},
        "proposal": {"overrides": fitting[0], "peak": fitting[1]} if fitting else None,
        "strategy": strategy(run.train.counts.rows),
    }


def _measured(earlier: list[dict[str, Any]], config: SftConfig, run: Run) -> dict[str, Any]:
    """Seconds by the speed of an earlier run of the same base and method on this machine, where there is one."""
    method = config.adapter.method if config.adapter else "partial" if config.trainable else "full"
    for other in earlier:
        same = (other["base"], other["method"]) == (config.model.name, method)
        if same and other["tokens_per_s"]:
            speed = other["tokens_per_s"]
            return {"seconds": run.tokens / speed, "basis": f"{speed:,.0f} tokens/s, measured in {other['run']}"}
    return {}


def strategy(number: int) -> str:
    """What so many rows suggest. Orders of magnitude, no law: an evaluation against the base decides."""
    if number < 200:
        return "few rows: try them as examples in the prompt first ('llmtune eval' measures that arm); then an adapter of low rank"
    if number < 5_000:
        return "hundreds to a few thousand rows: an adapter (the base stays frozen, little can be forgotten)"
    if number < 50_000:
        return "thousands to tens of thousands of rows: an adapter, or 'trainable' with the top blocks where validation stops improving"
    return "tens of thousands of rows and more: full fine-tuning can pay where an adapter's validation loss has stopped improving"


def available(device: str) -> float:
    """Bytes that a run may take here: of the GPU, or of the machine's memory (a container's limit counts) that is free."""
    if device != "cpu":
        return float(torch.cuda.get_device_properties(0).total_memory) - CONTEXT
    free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024.0
    with contextlib.suppress(OSError, ValueError):
        free = min(free, float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return free + resident()  # what this process holds goes when it ends


def resident() -> float:
    """Bytes of memory that this process holds now: with the libraries and the rows of the run in it, what a run begins with."""
    import trl.trainer.sft_trainer  # noqa: F401 - the run holds it

    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


LORA = AdapterConfig.model_validate({"method": "lora", "r": 16, "target_modules": "all-linear"})
STRATEGIES: dict[str, tuple[AdapterConfig | None, TrainableConfig | None, str | None]] = {
    "full": (None, None, None),
    "top 4 blocks": (None, TrainableConfig(top_blocks=4), None),
    "LoRA r=16": (LORA, None, None),
    "QLoRA r=16": (LORA, None, "nf4"),
}
SHARDINGS: dict[str, memory.Sharding] = {"DDP": "ddp", "FSDP2": "fsdp2", "ZeRO-3": "zero3"}
ALONE: dict[str, memory.Sharding] = {"-": "none"}


def strategies(config: PretrainedConfig, gpus: list[int], gpu_memory: float, micro: int, length: int) -> dict[str, Any]:
    """Bytes a GPU for each strategy, with and without activation checkpointing, on each number of GPUs, by each sharding.

    bfloat16 arithmetic, AdamW, one micro batch a step, every token supervised. `first` is each strategy's first configuration
    that fits: fewest GPUs, then without checkpointing, then the sharding that shards least.
    """
    lines: list[dict[str, Any]] = []
    first: dict[str, dict[str, Any]] = {}
    blocks = config.get_text_config().num_hidden_layers
    for name, (adapter, trainable, quantize) in STRATEGIES.items():
        if trainable and trainable.top_blocks and trainable.top_blocks >= blocks:
            continue
        model = memory.sketch(config, adapter, trainable, compute="bfloat16", adapter_dtype="bfloat16")
        held = memory.kept(model, length, mixed=adapter is None)
        batch = Batch(micro, length, micro * length, length)
        for devices in gpus:
            for checkpointing in (False, True):
                for word, sharding in (SHARDINGS if devices > 1 else ALONE).items():
                    if quantize and sharding in ("fsdp2", "zero3"):
                        continue  # not proven here
                    need = memory.need(
                        model,
                        held,
                        batch,
                        checkpointing=checkpointing,
                        accumulates=False,
                        compute="bfloat16",
                        on_cpu=False,
                        quantize=quantize,
                        sharding=sharding,
                        devices=devices,
                    )
                    fits = need.peak <= ROOM * (gpu_memory - CONTEXT)
                    line = {
                        "strategy": name,
                        "gpus": devices,
                        "sharding": word,
                        "activation_checkpointing": checkpointing,
                        "trained": memory.count(model)[1],
                        "peak": need.peak,
                        "fits": fits,
                    }
                    lines.append(line)
                    if fits:
                        first.setdefault(name, line)
    return {"parameters": memory.count(model)[0], "lines": lines, "first": first, "micro": micro, "length": length}


def shape_of(path: str) -> Any:
    """The config at `path`: a model's folder, its config.json, or a name that `sft` takes. Raises ConfigError."""
    from transformers import AutoConfig

    place = Path(path)
    folder = place if place.is_file() or (place / "config.json").is_file() else load.find(path).folder
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError("--model", f"{path}: no model's config ({' '.join(str(error).split())[:200]})") from None


def gigabytes(number: float) -> str:
    return f"{number / GB:,.2f}" if number < 100 * GB else f"{number / GB:,.0f}"


def minutes(seconds: float) -> str:
    whole = math.ceil(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min" if whole < 7200 else f"{whole / 3600:.1f} h"
