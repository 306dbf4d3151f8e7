"""What every trained stage builds before its first step: the model with what is trained of it, and the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, PrinterCallback, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig as TrlConfig

from llmtune import ranks
from llmtune.config import Recorded
from llmtune.errors import ConfigError, LlmtuneError
from llmtune.model import adapters, freeze, infer, load
from llmtune.progress import say
from llmtune.training import arguments, group, optim, packing, rows
from llmtune.training.callbacks import AllocateRanks
from llmtune.training.rows import Split
from llmtune.training.trainer import SupervisedTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rehearse(views: list[Recorded], base: load.Source, place: object) -> None:
    """Choose what each phase trains on the model without its weights, so that what cannot be chosen costs no time.

    Raises ConfigError as `build_model` and `build_trainer` would. An adapter is PEFT's to choose, on the weights.
    """
    for view in views:
        if view.adapter is None and not base.quantised:
            model = load.skeleton(base, trust_remote_code=view.model.trust_remote_code)
            if view.trainable is not None:
                freeze.freeze(model, view.trainable.whole(), "float32")
            optim.rates(view.train, model, place)


def build_model(view: Recorded, base: load.Source, train: Split, device: str, place: object) -> Any:
    """The base with what is trained of it: an adapter where the run has one, else the weights it names, else every one.

    Raises ConfigError where the settings do not fit the model.
    """
    adapted, compute = view.adapter is not None, load.choose_dtype(view.model.dtype, device)
    # a trained weight of the base is kept in float32: a bfloat16 one does not feel a small update
    weights, place_of_load = (view.model.dtype, device) if adapted else ("float32", "cpu")
    if group.sharded():  # accelerate spreads it from there: the whole of it may not fit on one GPU
        weights, place_of_load, device = compute if adapted else weights, "cpu", "cpu"
    set_seed(view.train.seed)
    model: Any = load.load_model(
        base, weights, place_of_load, attention=view.model.attention, trust_remote_code=view.model.trust_remote_code
    )
    limit = infer.context_length(model)
    if limit and view.data.max_length > limit:
        raise ConfigError(
            place, f"data.max_length: {view.data.max_length} is more than the {limit} positions of the model"
        )
    if adapted:
        return adapters.build_adapter(
            model,
            view.adapter.whole(),
            view.train.adapter_dtype,
            view.train.learning_rate,
            view.train.seed,
            steps=arguments.total_steps(view, len(train.rows)),
            rows=train.rows,
        )
    if view.trainable is not None:
        chosen = view.trainable.whole()
        if also := freeze.tied(model, chosen):
            say(f"  {also}")
        freeze.freeze(model, chosen, compute)
    return model.to(device)


def build_trainer(
    view: Recorded,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train: Split,
    validation: Split | None,
    folder: Path,
    device: str,
    place: object,
) -> SupervisedTrainer:
    """The trainer of the run, its checkpoints in `folder`. Raises ConfigError for a name that transformers refuses."""
    compute = load.choose_dtype(view.model.dtype, device)
    if getattr(
        model, "is_quantized", False
    ):  # one that is quantised on disk computes in its own dtype, whatever auto is here
        compute = str(model.dtype).removeprefix("torch.")
    trainable = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    mixed = compute == "bfloat16" and "torch.float32" in map(str, trainable)
    words = arguments.to_trl(
        view,
        rows=len(train.rows),
        checkpoints=folder,
        device=device,
        mixed_bf16=mixed,
        processes=ranks.world_size(),
    )
    stopping = words.pop("early_stopping")
    try:
        args = TrlConfig(**words)
    except (ValueError, ImportError) as error:
        raise ConfigError(place, f"train: {error}") from None
    if args.world_size != ranks.world_size():
        raise LlmtuneError(
            f"{ranks.world_size()} processes were launched, and transformers trains in {args.world_size}: "
            "each would train alone; use 'llmtune sft CONFIG --processes N', or torchrun"
        )
    unit = args.per_device_train_batch_size * args.world_size if args.world_size > 1 else 1
    evened = rows.evened(train.rows, unit)
    trainer = SupervisedTrainer(
        model=model,
        args=args,
        train_dataset=evened,
        blanks=len(evened) - len(train.rows),
        eval_dataset=rows.evened(validation.rows, unit) if validation else None,
        processing_class=tokenizer,
    )
    group.check_in_effect(trainer.accelerator, place)
    trainer.rates = optim.rates(view.train, model, place)
    trainer.data_collator = packing.Collator(tokenizer.pad_token_id, padding_free=view.data.packing)
    if view.data.packing:
        packing.require_isolation(model, train.rows, trainer.data_collator, place, mixed_bf16=mixed)
    trainer.remove_callback(PrinterCallback)
    if stopping:
        trainer.add_callback(EarlyStoppingCallback(*stopping))
    if hasattr(getattr(model, "base_model", None), "rankallocator"):
        trainer.add_callback(AllocateRanks(model))
    return trainer


def whole_model(view: Recorded, spread: Any, base: load.Source, train: Split, place: object) -> Any:
    """The trained model in one piece: in the first process, or in each that has a copy. Every process calls it."""
    if not group.sharded():
        return spread
    weights = group.gathered(spread)
    if ranks.rank() > 0:
        return spread
    unset_hf_deepspeed_config()  # or transformers would spread this one, too, and wait for the other processes
    model = build_model(view, base, train, "cpu", place)
    for name, weight in weights.items():
        model.get_parameter(name).data.copy_(weight)
    return model
