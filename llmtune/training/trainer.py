"""TRL's SFTTrainer, corrected where it was measured to train, validate, save or resume otherwise than a run here must."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from trl import SFTTrainer

from llmtune import ranks
from llmtune.data.tokens import IGNORED
from llmtune.model import adapters
from llmtune.model.infer import supervised_logits
from llmtune.training import blame, checkpoints, group, optim

ADAPTER_STATE = "adapter_state.safetensors"
"""In a checkpoint, beside PEFT's own file, which for some methods is not enough to go on from."""


class SupervisedTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with a loss, batches, a validation, checkpoints and rates of its own.

    Without Triton (any CPU) TRL 1.16 runs the language-model head on every position; here it runs where a label stands. On a
    GPU TRL's fused kernel does that already and is used, unless the adapter has a part in the head or a loss of its own. The
    loss of a step is sum(weight x loss) / sum(weight) over its supervised tokens, whatever the micro batches, the processes
    and the model's class; TRL knows no weights, and takes the mean of batch means where a class, such as Gemma 3's, says that
    it does not count. The validation loss of transformers is such a mean, too.

    `PeftModel.load_adapter`, by which transformers resumes and takes the best checkpoint back, turns bfloat16 adapters into
    float32 ones (another trajectory, another speed), and reads a file that for some methods is not the whole adapter; TRL
    makes every adapter on a quantised base bfloat16. Here an adapter keeps the dtype that it was built in. transformers' own
    grouping by length runs an epoch of less than fifty batches from the longest rows to the shortest and draws from the
    global generator, so that a run resumed inside an epoch sees other batches; see LengthBuckets. TRL's telemetry is off.
    """

    loss_is_scaled_for_ga = True
    seen_tokens = 0
    """Tokens trained on so far in this process, padding not counted."""
    learned = (0.0, 0.0)
    validated = (0.0, 0.0)
    """Sums of losses and of the weights of supervised tokens in this process: of training since the last validation, and of validation."""
    saved_step: int | None = None
    """The step of the last checkpoint that this process wrote."""
    _finite_step = 0
    """The last step whose gradient was seen to be finite."""
    _last_step: tuple[Any, ...] | None = None
    """What a step that is dropped half-way has touched, as it was after the last whole one: random numbers and `learned`."""
    rates = optim.Rates()

    def __init__(self, *, model: Any, blanks: int = 0, **settings: Any) -> None:
        self.blanks = blanks
        """How many rows at the end of the training rows are there only to make their number even."""
        made = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
        if hasattr(model, "peft_config"):
            # TRL refuses an adapter on the head, since its own loss goes round it; ours does not: see adapters.leaves_the_head
            model.get_output_embeddings = lambda: None
        super().__init__(model=model, **settings)
        vars(model).pop("get_output_embeddings", None)
        for name, weight in model.named_parameters():
            if name in made and weight.dtype != made[name].dtype:
                weight.data = made[name].to(weight.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        assert not return_outputs, "validation asks for the loss only"
        weights, labels = inputs.pop("weights", None), inputs["labels"]
        if self.model.training:
            self.seen_tokens += _tokens(inputs)
        if self.accelerator.device.type == "cuda" and weights is None and adapters.leaves_the_head(self.model):
            fused: torch.Tensor = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self._count(fused, int((labels[:, 1:] != IGNORED).sum()), num_items_in_batch)
            return fused
        logits, targets = supervised_logits(model, {k: v for k, v in inputs.items() if k != "labels"}, labels)
        each = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        weight = torch.ones_like(each) if weights is None else weights[:, 1:][labels[:, 1:] != IGNORED]
        if num_items_in_batch is None:
            whole = weight.sum().clamp(min=1e-9)  # blank rows have none
        else:  # gradients are averaged over the processes, and the count is of all of them
            whole = num_items_in_batch / self.accelerator.num_processes
        loss = (each * weight).sum() / whole
        self._count(loss, weight.sum().item(), num_items_in_batch)
        if self.model.training and (own := adapters.own_loss(self.model, labels)) is not None:
            loss = loss + own * weight.sum() / whole
        return loss

    def _count(self, loss: torch.Tensor, weight: float, num_items_in_batch: Any) -> None:
        of = weight if num_items_in_batch is None else float(num_items_in_batch) / self.accelerator.num_processes
        so_far = self.learned if self.model.training else self.validated
        both = so_far[0] + loss.item() * of, so_far[1] + weight
        if self.model.training:
            self.learned = both
        else:
            self.validated = both

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """What the loss of a step is divided by: its supervised tokens over all processes; weighted rows, their weights."""
        total: Any = 0
        for batch in batch_samples:
            counted = batch["labels"][:, 1:] != IGNORED
            total += (batch["weights"][:, 1:][counted] if "weights" in batch else counted).sum()
        return self.accelerator.gather(torch.as_tensor(total, device=device)).sum()

    def evaluation_loop(self, *arguments: Any, **settings: Any) -> Any:
        """As transformers', but the loss is the mean over tokens, whatever the batches: theirs is a mean of batch means.

        Beside it stand the mean training loss over the tokens of all steps since the last validation, and the gap.
        """
        self.validated = (0.0, 0.0)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # to validate more or less often trains no other model
            output = super().evaluation_loop(*arguments, **settings)
        loss, tokens, learned, learned_tokens = group.total([*self.validated, *self.learned])
        output.metrics["eval_loss"] = loss / tokens
        if not math.isfinite(loss):
            raise blame.validation(self, arguments[0], max(self._finite_step, self._initial_global_step))
        if learned_tokens:
            output.metrics["eval_training_loss"] = learned / learned_tokens
            output.metrics["eval_gap"] = loss / tokens - learned / learned_tokens
        self.learned = (0.0, 0.0)
        return output

    def validate(self) -> None:
        """Validate at this step, as training does when it is this step's turn."""
        self._determine_best_metric(self._evaluate(None, None), None)

    def get_batch_samples(self, *arguments: Any, **settings: Any) -> Any:
        samples = super().get_batch_samples(*arguments, **settings)
        self._step_batches = samples[0]
        return samples

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As transformers'; a gradient that is not finite ends the run before it reaches the weights, and names the rows.

        Looked at where it costs no wait: on a CPU at every step, on a GPU at those that wait for it anyway.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step, rhythms = (
            self.state.global_step + 1,
            (self.state.logging_steps, self.state.eval_steps, self.state.save_steps),
        )
        looked = self.args.device.type == "cpu" or any(every and step % every == 0 for every in rhythms)
        if looked or step == self.state.max_steps:
            if not math.isfinite(norm):
                raise blame.training(self, self._step_batches, max(self._finite_step, self._initial_global_step))
            self._finite_step = step
        return norm

    def save_last_step(self) -> None:
        """Write the checkpoint of the last whole optimizer step of this process, if there is one and it is not written yet.

        What came after that step must not have reached the optimizer. The weights, its state and the schedule are then those of
        that step; the random numbers are set back to it; a validation that was not finished stands in the checkpoint as due.
        """
        if self._last_step is None or self.saved_step == self.state.global_step:
            return
        random_states, self.learned = self._last_step
        _set_random(random_states)
        self._save_checkpoint(self.model, None)
        self.callback_handler.on_save(self.args, self.state, self.control)

    def _maybe_log_save_evaluate(self, *arguments: Any, **settings: Any) -> None:
        self._last_step = _get_random(), self.learned
        super()._maybe_log_save_evaluate(*arguments, **settings)
        self._last_step = _get_random(), self.learned

    def _run_epoch(self, *arguments: Any, **settings: Any) -> None:
        if not self.control.should_training_stop:  # transformers would train one more step when resumed at its last
            # of several processes, accelerate's loader that skips what a checkpoint has seen does not pass the epoch on
            settings["train_dataloader"].set_epoch(settings["epoch"])
            super()._run_epoch(*arguments, **settings)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        real = len(rows) - self.blanks
        grouped = self.args.train_sampling_strategy == "group_by_length"
        lengths = rows["length"][:real] if grouped else [0] * real
        return LengthBuckets(lengths, batch, self.args.data_seed, self.blanks)

    def create_optimizer(self, model: Any = None) -> Any:
        """As transformers', with the run's options and rates: given groups of parameters, it takes them for its own."""
        if self.optimizer is None:
            trained, rates = model or self.model, self.rates
            kind, words = optim.chosen(self.args, trained, rates.options, "train")
            if rates.layer_decay or rates.lora_plus_ratio:
                decaying = set(self.get_decay_parameter_names(trained))
                settings = self.args.learning_rate, self.args.weight_decay
                words["params"] = optim.groups(trained, decaying, *settings, rates)
            self.optimizer_cls_and_kwargs = kind, words
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        schedule = super().create_scheduler(num_training_steps, optimizer)
        optim.check_floor(schedule, optimizer or self.optimizer, "train")
        return schedule

    def _send_telemetry(self) -> None:
        """No run of ours reports anything to anyone."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not hasattr(self.model, "peft_config"):
            super()._save(output_dir, state_dict)
            return
        before = adapters.state(self.model)
        with adapters.peft_warnings():
            super()._save(output_dir, state_dict)
        adapters.restore(
            self.model, before
        )  # CPT's weights are projected anew when they are saved, which is a step of its own
        if self.args.should_save:  # every process comes here, one writes
            save_file(before, Path(output_dir or self.args.output_dir) / ADAPTER_STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if group.sharded() or not _restore_adapter(model or self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if ranks.rank() > 0 and not group.sharded() and not (best / checkpoints.SEAL).is_file():
            return  # on another machine; the first process writes the result
        if group.sharded() or not _restore_adapter(self.model, best):
            super()._load_best_model()


def _get_random() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002


def _set_random(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


class LengthBuckets(Sampler[int]):  # type: ignore[misc]
    """Batches of rows of like length, in random order, drawn anew each epoch from `seed` and the epoch alone.

    `batch_size` is that of an optimizer step over all processes: the same rows meet in a step, however many there are.
    With equal lengths the rows are in any order. `blanks` rows follow them, always last.
    """

    MEGABATCH = 50
    """Batches that are sorted together: enough for little padding, few enough for varied batches."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int, blanks: int = 0) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch, self.blanks = lengths, batch_size, seed, 0, blanks

    def __len__(self) -> int:
        return len(self.lengths) + self.blanks

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        whole = len(order) - len(order) % self.batch_size  # what is left over stays last, or it would shift the others
        batches = []
        for start in range(0, whole, self.MEGABATCH * self.batch_size):
            part = order[start : min(start + self.MEGABATCH * self.batch_size, whole)]
            part.sort(key=lambda row: self.lengths[row])
            batches += [part[n : n + self.batch_size] for n in range(0, len(part), self.batch_size)]
        for n in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[n]
        yield from order[whole:]
        yield from range(len(order), len(self))


def _tokens(inputs: dict[str, Any]) -> int:
    """Tokens of the batch's rows: neither padding nor rows without loss."""
    labelled = inputs["labels"] != IGNORED
    if "attention_mask" in inputs:
        return int(inputs["attention_mask"][labelled.any(dim=1)].sum())
    return int(torch.isin(inputs["seq_idx"], inputs["seq_idx"][labelled]).sum())


def _restore_adapter(model: Any, checkpoint: Path) -> bool:
    """Copy what a checkpoint holds of the adapter into `model` in place; False when `model` carries no adapter."""
    if not hasattr(model, "peft_config"):
        return False
    adapters.restore(model, load_file(checkpoint / ADAPTER_STATE))
    return True
