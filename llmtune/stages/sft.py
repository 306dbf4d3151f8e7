"""Supervised fine-tuning: `llmtune sft CONFIG`, or `accelerate launch -m llmtune sft CONFIG`, in one process.

One run, top to bottom: data, base model, adapter, trainer, train, artifact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
from filelock import FileLock, Timeout
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed
from trl import SFTConfig as TrlConfig

from llmtune import artifact, plots
from llmtune.artifact import Artifact, out_of_space_explained
from llmtune.config import Recorded
from llmtune.config.sft import SftConfig
from llmtune.data.chats import load_chats
from llmtune.data.rows import fingerprint
from llmtune.data.tokens import IGNORED, Counts, encode_chats, write_dataset
from llmtune.errors import ConfigError, LlmtuneError, Preempted, UserError
from llmtune.model import adapters, infer, load
from llmtune.progress import say
from llmtune.training import arguments, checkpoints
from llmtune.training.callbacks import MetricsFile, ProgressDisplay, SealCheckpoints, StopOnSignal
from llmtune.training.trainer import SupervisedTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def run(config: SftConfig, place: object = "config") -> Artifact:
    """Fine-tune `config.model` on `config.data` and write the result to `config.output_dir`.

    Only assistant turns carry loss. With `config.adapter` the artifact is `output_dir/adapter`; without it, `output_dir/model`.
    An interrupted run goes on from its last whole checkpoint. Raises ConfigError or DataError before any weight is loaded,
    where it follows from the run file and the rows; what only PEFT or transformers can tell comes after.
    """
    view = Recorded(config)
    assert view.stage == "sft"
    output = Path(view.output_dir)
    target = output / ("adapter" if view.adapter is not None else "model")
    if target.exists():
        artifact.read(target)  # names what is wrong with it, if anything
        raise ConfigError(
            place, f"output_dir: {target} is finished already; choose another output_dir, or move it away"
        )
    arguments.check_processes(view, place)
    for tracker in view.tracking:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(place, f"tracking: {tracker} is not installed; pip install 'llmtune[{tracker}]'")
    device = load.choose_device(view.model.device)
    with out_of_space_explained(output), _alone(output, place), _boards(output):
        prints = {name: fingerprint(source) for name, source in _sources(view)}
        base = load.find(view.model.name, trust_remote_code=view.model.trust_remote_code)
        if warning := base.licence_warning:
            say(f"  licence: {warning}")
        tokenizer = load.load_tokenizer(base, trust_remote_code=view.model.trust_remote_code)
        folder = output / "checkpoints"
        checkpoints.claim(folder, checkpoints.identity(config.model_dump(mode="json"), prints, base.facts()), place)
        try:
            train_rows, train_counts = _tokenise(view, "train", tokenizer, folder)
            valid_rows, valid_counts = _tokenise(view, "validation", tokenizer, folder)
            if shared := train_counts.keys & valid_counts.keys:
                raise ConfigError(
                    place, f"data.validation: {len(shared)} of its rows are training rows too; remove them from one"
                )
            trainer = _build_trainer(view, base, tokenizer, train_rows, valid_rows, folder, device, place)
            _assert_nothing_lost(trainer.train_dataset, train_counts)
            view.require_all_read(place)
        except UserError:
            if not checkpoints.last_complete(folder):
                shutil.rmtree(folder)  # nothing to go on from
            raise
        metrics = _train(trainer, folder)
        facts = {
            "config": config.model_dump(mode="json", exclude_none=True),
            "base": {**base.facts(), "dtype": str(trainer.model.dtype).removeprefix("torch.")},
            "data": _data_facts(prints, {"train": train_counts, "validation": valid_counts}),
            "template_sha256": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
            "seeds": {"seed": view.train.seed},
            "metrics": metrics,
        }
        with artifact.writing(target, "adapter" if config.adapter else "model") as draft:
            draft.facts.update(facts)
            trainer.model.save_pretrained(draft.path, safe_serialization=True)
            tokenizer.save_pretrained(draft.path)
            (draft.path / "README.md").unlink(missing_ok=True)  # PEFT's empty card
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8")
            (draft.path / "metrics.jsonl").write_text(lines, encoding="utf-8")
            svg = plots.curves_svg([json.loads(line) for line in lines.splitlines()])
            (draft.path / "curves.svg").write_text(svg, encoding="utf-8")
    shutil.rmtree(folder)
    return artifact.read(target)


@contextlib.contextmanager
def _boards(output: Path) -> Iterator[None]:
    """Keep TensorBoard's files in the run's folder; transformers would put them among the checkpoints."""
    given = os.environ.get("TENSORBOARD_LOGGING_DIR")
    os.environ["TENSORBOARD_LOGGING_DIR"] = given or str(output / "tensorboard")
    try:
        yield
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
        if given:
            os.environ["TENSORBOARD_LOGGING_DIR"] = given


@contextlib.contextmanager
def _alone(output: Path, place: object) -> Iterator[None]:
    """Hold the run's folder: a second run in it at the same time is refused."""
    if output.exists() and not output.is_dir():
        raise ConfigError(place, f"output_dir: {output} is a file, and a folder is needed")
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".llmtune.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            place, f"output_dir: another run is writing into {output}; wait for it, or choose another"
        ) from None
    try:
        yield
    finally:
        lock.release()
        (output / ".llmtune.lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            output.rmdir()  # when nothing came of it


def _sources(view: Recorded) -> list[tuple[str, str]]:
    named = (("train", view.data.train), ("validation", view.data.validation))
    found = [(name, [given] if isinstance(given, str) else given or []) for name, given in named]
    return [(f"{name} {source}", source) for name, sources in found for source in sources]


def _tokenise(
    view: Recorded, split: str, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[Dataset | None, Counts]:
    """Rows of one split as token ids and labels in an Arrow file, and the account of every row."""
    sources, counts, data = getattr(view.data, split), Counts(), view.data
    if sources is None:
        return None, counts
    columns = data.columns.whole() if data.columns is not None else None
    chats = load_chats(sources, data.format, columns, training=True)
    rows = encode_chats(chats, tokenizer, data.max_length, data.overlong, counts)
    dataset = write_dataset(rows, folder / f"{split}.arrow")
    lost = "".join(f", {number} {what}" for what in ("dropped", "truncated") if (number := getattr(counts, what)))
    say(
        f"  {split}: {counts.rows} rows, {counts.tokens:,} tokens, {counts.supervised_tokens:,} of them supervised{lost}"
    )
    return dataset, counts


def _build_trainer(
    view: Recorded,
    base: load.Source,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    valid_rows: Dataset | None,
    folder: Path,
    device: str,
    place: object,
) -> SupervisedTrainer:
    """The one place where our words become TRL's."""
    compute = load.choose_dtype(view.model.dtype, device)
    adapted = view.adapter is not None
    # full fine-tuning keeps float32 master weights: a bfloat16 weight does not feel a small update
    weights = compute if adapted else "float32"
    set_seed(view.train.seed)
    model: Any = load.load_model(base, weights, device, trust_remote_code=view.model.trust_remote_code)
    limit = infer.context_length(model)
    if limit and view.data.max_length > limit:
        raise ConfigError(
            place, f"data.max_length: {view.data.max_length} is more than the {limit} positions of the model"
        )
    if adapted:
        train = view.train
        model = adapters.build_adapter(
            model, view.adapter.whole(), train.adapter_dtype, train.learning_rate, train.seed
        )
    trainable = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    mixed = compute == "bfloat16" and "torch.float32" in map(str, trainable)
    words = arguments.to_trl(
        view,
        rows=len(train_rows),
        checkpoints=folder,
        device=device,
        mixed_bf16=mixed,
    )
    stopping = words.pop("early_stopping")
    try:
        args = TrlConfig(**words)
    except (ValueError, ImportError) as error:
        raise ConfigError(place, f"train: {error}") from None
    trainer = SupervisedTrainer(
        model=model, args=args, train_dataset=train_rows, eval_dataset=valid_rows, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    if stopping:
        trainer.add_callback(EarlyStoppingCallback(*stopping))
    return trainer


def _assert_nothing_lost(dataset: Dataset, counts: Counts) -> None:
    """What TRL is about to train on is what we gave it: as many rows, as many supervised tokens."""
    labels = pc.list_flatten(dataset.data.column("labels"))
    supervised = pc.sum(pc.not_equal(labels, IGNORED)).as_py()
    if (len(dataset), supervised) != (counts.rows, counts.supervised_tokens):
        raise LlmtuneError(
            f"TRL holds {len(dataset)} rows with {supervised} supervised tokens, and was given {counts.rows} rows with "
            f"{counts.supervised_tokens}: this version of TRL changes rows; install the one in constraints.txt"
        )


def _train(trainer: SupervisedTrainer, folder: Path) -> dict[str, Any]:
    """Train, from the last whole checkpoint where there is one. Returns the run's metrics."""
    stop, display = StopOnSignal(), ProgressDisplay()
    for callback in (SealCheckpoints(), MetricsFile(folder / "metrics.jsonl", trainer), display, stop):
        trainer.add_callback(callback)
    resume = checkpoints.last_complete(folder)
    if resume:
        say(f"  resuming from {resume.name}")
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        display.close()
        stop.restore()
    if stop.received is not None:
        done = f"stopped at step {trainer.state.global_step}; the same command goes on from there"
        if stop.received == signal.SIGTERM:
            raise Preempted(done)
        say(f"  {done}")
        raise KeyboardInterrupt
    # from the file, which an interruption does not cut short: the whole run's, not this process's
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if "loss" in line]
    tokens, seconds = sum(line["tokens"] for line in logged), sum(line["seconds"] for line in logged)
    best = trainer.state.best_model_checkpoint
    return {
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "train_loss": sum(line["loss"] for line in logged) / len(logged),
        "validation_loss": trainer.state.best_metric,
        "best_step": int(Path(best).name.removeprefix("checkpoint-")) if best else trainer.state.global_step,
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_memory_gb": round(max(line["memory_gb"] for line in logged), 3),
        "total_parameters": trainer.model.num_parameters(),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def _data_facts(prints: dict[str, str], counts: dict[str, Counts]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for split, count in counts.items():
        sources = [
            {"path": key.partition(" ")[2], "sha256": sha} for key, sha in prints.items() if key.startswith(split)
        ]
        facts[split] = {"sources": sources, **dataclasses.asdict(count), **count.facts()} if sources else None
        if facts[split]:
            del facts[split]["lengths"], facts[split]["keys"]
    return facts
