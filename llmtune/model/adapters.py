"""Building an adapter by PEFT's names, and attaching a finished one to its own base."""

from __future__ import annotations

import contextlib
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from llmtune.artifact import Artifact
from llmtune.config.peft_methods import NO_MERGE
from llmtune.config.train import AdapterConfig
from llmtune.errors import ArtifactError, ConfigError, LlmtuneError
from llmtune.model import infer, initialisations, load, targets
from llmtune.model.load import Source
from llmtune.progress import say

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

BF16_LEARNING_RATE = 1e-4
"""Below this, an update is often smaller than bfloat16's step (2^-8 of the weight) and is rounded away."""
BF16_HALF_STEP = 2**-9
SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What AdaLoRA's allocator has learned about each weight's importance."""


def build_adapter(
    model: PreTrainedModel,
    adapter: AdapterConfig,
    dtype: str,
    learning_rate: float,
    seed: int,
    *,
    steps: int | None = None,
    rows: Iterable[dict[str, Any]] = (),
) -> PeftModel:
    """`model` with a new adapter, its weights drawn from `seed`.

    dtype: "auto" keeps the base's dtype, except float32 where bfloat16 would round the updates of this learning rate away.
    PEFT's own default, float32 adapters on a bfloat16 base, costs a third of the speed on a CPU.
    steps: optimizer steps of the run, which AdaLoRA's schedule ends at. rows: token rows that EVA and CorDA look at.
    Raises ConfigError with PEFT's reason when the fields do not fit each other or the model.
    """
    torch.manual_seed(seed)
    before, given = _probe(model), set(model.parameters())
    made = wrap(model, adapter, steps, rows)
    _follow_base(made, given)
    if adapter.method == "lily":
        say(
            "  lily mixes its experts by the mean over a whole batch: an answer depends on the rows beside it and on tokens "
            "after it, so its loss while training is too good"
        )
    if not any(parameter.requires_grad for parameter in made.parameters()):
        raise ConfigError("adapter", f"{adapter.method} with these fields has no weight to train")
    _choose_dtype(made, adapter.method, dtype, learning_rate)
    _require_base(made, before)
    return made


def _require_base(made: Any, before: torch.Tensor) -> None:
    """Raises ConfigError unless the adapter off gives the base. One that took a part out of it was checked when it did."""
    if initialisations.takes_from_the_base(made):
        return
    with made.disable_adapter():
        if not torch.equal(before, _probe(made)):
            raise ConfigError(
                "adapter",
                "these fields change the base's own weights, so that switching the adapter off no longer gives the base; "
                "leave out kasa_config, or what else is not of LoRA itself",
            )


def wrap(
    model: PreTrainedModel,
    adapter: AdapterConfig,
    steps: int | None = None,
    rows: Iterable[dict[str, Any]] | None = None,
) -> PeftModel:
    """`model` with the layers of a new adapter, as PEFT makes them. Raises ConfigError with PEFT's reason.

    rows: for an initialisation that looks at some. Without, weights that begin in a special way begin in the plain one.
    """
    import peft

    try:
        with peft_warnings():
            config = peft_config(adapter, steps)
            if rows is None and initialisations.kind(config):
                config.init_lora_weights = True
            targets.check(model, config)
            initialisations.require_invocation(config, rows or ())
            images = initialisations.before(model, config, rows or ())
            made = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
            loftq = rows is not None and adapter.options.get("init_lora_weights") == "loftq"
            initialisations.after(made, rows or (), images, loftq=loftq)
    except (TypeError, ValueError, AttributeError) as error:
        schedule = f" (total_step is the {steps} steps of the run)" if "total_step" in str(error) else ""
        raise ConfigError("adapter", _reason(error, model) + schedule) from None
    except RuntimeError as error:
        if "floating point" not in str(error):
            raise
        raise ConfigError("adapter", "asks for a gradient of quantised weights (in modules_to_save, say)") from None
    targets.check_patterns(made)
    _fit_to_runs(made)
    return made


HARMLESS = (
    "`(is_)?gradient_checkpointing",  # PEFT 0.21 reads names that transformers 5.23 deprecates
    "Failed to load the CUDA extension",  # BOFT multiplies by torch's own means then
    "Unsupported layer type .*Norm",  # ln_tuning says so of every norm that is not torch's
    "Sparse invariant checks",
    r"The following rank_pattern keys did not match.*\.lora_E'",  # AdaLoRA's own note of the ranks it pruned
    r"Adapter .* \d+ LoRA tensor\(s\) have invalid shape.*lora_[AB]:\((0, \d+|\d+, 0)\)",  # AdaLoRA pruned a rank to nothing
)


@contextlib.contextmanager
def peft_warnings() -> Iterator[None]:
    """Pass on, in one line, what PEFT warns of while a model is built, read or written; HARMLESS says what is not passed on."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        yield
    for line in dict.fromkeys(" ".join(str(warning.message).split()) for warning in heard):
        if not any(re.match(pattern, line) for pattern in HARMLESS):
            say(f"  note: peft: {line}")


def peft_config(adapter: AdapterConfig, steps: int | None = None) -> Any:
    """PEFT's own config of the method, with what follows from the run."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    given = dict(adapter.options)
    if adapter.method == "adalora":
        given["total_step"] = steps
    if given.get("init_lora_weights") == "loftq":
        given["init_lora_weights"] = True  # by PEFT's own hand it would round the base anew; see initialisations.after
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(adapter.method.upper())](task_type="CAUSAL_LM", **given)


def save(made: Any, folder: Path) -> None:
    """Write the adapter as PEFT does, so that anyone's PEFT puts it on the base it was trained on."""
    with peft_warnings():
        initialisations.save(made, folder)


def _reason(error: Exception, model: Any) -> str:
    reason = " ".join(str(error).split())
    return f"{reason}. {targets.candidates(model)}" if "arget modules" in reason else reason


def _fit_to_runs(made: Any) -> None:
    """What PEFT leaves to its caller: rows carry no task here, so the methods that mix by task are given the first; on a
    bfloat16 base AdaLoRA's `ranknum` becomes trainable while it is not saved, so it is frozen again; and FRoD's sparse
    matrices are torch's own, so torch need not warn that it does not check them."""
    from peft import PeftType
    from peft.tuners.poly import PolyLayer

    def first_task(_: Any, args: Any, kwargs: Any) -> Any:
        tasks = torch.zeros(len(args[0]), dtype=torch.long, device=args[0].device)
        if kwargs.get("task_ids") is None and len(args) < 2:
            kwargs["task_ids"] = tasks
        elif len(args) > 1 and args[1] is None:
            args = (args[0], tasks)
        return args, kwargs

    method = made.active_peft_config.peft_type
    if method == PeftType.FROD:
        torch.sparse.check_sparse_tensor_invariants.disable()
    if method == PeftType.MULTITASK_PROMPT_TUNING:
        made.prompt_encoder["default"].register_forward_pre_hook(first_task, with_kwargs=True)
    for name, module in made.named_modules():
        if isinstance(module, PolyLayer):
            module.register_forward_pre_hook(first_task, with_kwargs=True)
        if method == PeftType.ADALORA and name.endswith(".ranknum"):
            module.requires_grad_(False)


def _choose_dtype(made: Any, method: str, dtype: str, learning_rate: float) -> None:
    """Put the adapter's weights into float32 where they are to be; raises ConfigError where PEFT's method cannot."""
    from peft.tuners.tuners_utils import BaseTuner

    if made.dtype == torch.float32:
        if dtype == "bfloat16":
            reason = "bfloat16 has no effect on a float32 base, which model.dtype makes it here; remove it"
            raise ConfigError("train.adapter_dtype", reason)
        return
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    narrow = [parameter for parameter in trained if parameter.dtype != torch.float32]
    if dtype == "bfloat16" and not narrow:
        raise ConfigError(
            "train.adapter_dtype", f"bfloat16 has no effect: PEFT keeps the weights of {method} in float32; remove it"
        )
    # a step of this size on a weight of this size is less than half of what bfloat16 can tell apart
    lost = max((float(p.detach().abs().float().mean()) for p in narrow), default=0.0) * BF16_HALF_STEP
    limit = max(BF16_LEARNING_RATE, lost)
    if made.dtype != torch.float16 and (dtype == "bfloat16" or (dtype == "auto" and learning_rate >= limit)):
        return  # float16, of a checkpoint quantised on disk, is no format to train in
    if isinstance(made.base_model, BaseTuner):
        made.base_model._cast_adapter_dtype(adapter_name="default", autocast_adapter_dtype=True)
        _fit_to_runs(made)
    if any(parameter.requires_grad and parameter.dtype != torch.float32 for parameter in made.parameters()):
        kept = (
            f"PEFT keeps weights of {method} in the base's bfloat16, where a step of {learning_rate:g} is rounded away"
        )
        fix = f"set model.dtype to float32, or train.learning_rate to {limit:.1g} or more"
        raise ConfigError("train.adapter_dtype", f"{kept}; {fix}")


def own_loss(model: Any, labels: torch.Tensor) -> torch.Tensor | None:
    """What the method adds to the loss of these rows, after their forward pass: PEFT adds it only where it takes the loss itself.

    AdaLoRA's orthogonality of A and B (Zhang et al. 2023, equation 4), and the loss of ShadowPEFT's own prediction.
    """
    from peft import PeftType

    if not hasattr(model, "peft_config"):
        return None
    config: Any = model.active_peft_config
    method = config.peft_type
    if method == PeftType.SHADOW and config.auxiliary_loss_weight:
        loss: torch.Tensor = model.base_model.shadow_auxiliary_loss(labels)
        return loss * config.auxiliary_loss_weight
    if method == PeftType.ADALORA and config.orth_reg_weight:
        factors = [p for name, p in model.named_parameters() if "lora_A" in name]
        factors += [p.T for name, p in model.named_parameters() if "lora_B" in name]
        gaps = [torch.linalg.norm(p @ p.T - torch.eye(len(p), dtype=p.dtype, device=p.device)) for p in factors]
        return torch.stack(gaps).mean() * config.orth_reg_weight
    return None


def leaves_the_head(model: Any) -> bool:
    """Whether a loss that multiplies with `lm_head.weight` by itself, as TRL's on a GPU, is this model's whole loss."""
    config = getattr(model, "active_peft_config", None)
    plain = type(model.get_output_embeddings()) is torch.nn.Linear
    own = any(getattr(config, weight, 0) for weight in ("orth_reg_weight", "auxiliary_loss_weight"))
    return config is None or (plain and not own and not config.is_prompt_learning)


def state(model: Any) -> dict[str, torch.Tensor]:
    """Everything of an adapter that training changes, by name: more than PEFT saves.

    P-tuning's file holds the prompt and not the network that makes it, and AdaLoRA's neither the pruned ranks nor the scores
    by which it prunes the next.
    """
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if allocator := getattr(model.base_model, "rankallocator", None):
        for kind in SCORES:
            found |= {f"{kind} {name}": scores for name, scores in getattr(allocator, kind).items()}
        ranks = model.active_peft_config.rank_pattern or {}
        found |= {f"rank_pattern {name}": torch.tensor(kept) for name, kept in ranks.items()}
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def restore(model: Any, saved: dict[str, torch.Tensor]) -> None:
    """Copy a `state` into the model in place. Raises LlmtuneError when it is of another adapter."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if strange := weights.keys() ^ {name for name in saved if " " not in name}:
        raise LlmtuneError(f"the checkpoint is of another adapter: {', '.join(sorted(strange)[:3])}")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])
    if allocator := getattr(model.base_model, "rankallocator", None):
        allocator.reset_ipt()
        parts = [(*name.split(" "), tensor) for name, tensor in saved.items() if " " in name]
        ranks = {name: tensor.tolist() for kind, name, tensor in parts if kind == "rank_pattern"}
        model.active_peft_config.rank_pattern = ranks or None
        for kind, name, tensor in parts:
            if kind != "rank_pattern":
                getattr(allocator, kind)[name] = tensor.to(model.device)


def attach(model: PreTrainedModel, base: Source, adapter: Artifact) -> PeftModel:
    """`model` with the finished adapter on it. Raises ArtifactError when the adapter was trained on another base."""
    from peft import PeftModel

    require_base(adapter, base)
    refuse_pickles(adapter.path)
    # what is evaluated and merged is what was trained: a bfloat16 adapter stays one, and so does a float32 one
    with safe_open(adapter.path / "adapter_model.safetensors", framework="pt") as tensors:
        wide = any(tensors.get_slice(name).get_dtype() == "F32" for name in tensors.keys())  # noqa: SIM118
    before, given = _probe(model), set(model.parameters())
    with peft_warnings():
        made = PeftModel.from_pretrained(model, adapter.path, autocast_adapter_dtype=wide).eval()
    if not wide:
        _follow_base(made, given)
    _fit_to_runs(made)
    with made.disable_adapter():
        if not torch.equal(before, _probe(made)):
            raise ArtifactError(
                f"{adapter.path}: changes the base's own weights, so that it cannot be compared with its base"
            )
    return made


def _follow_base(made: PeftModel, given: set[torch.nn.Parameter]) -> None:
    """Give what PEFT added to the `given` weights the base's dtype where PEFT cannot: an 8-bit layer has none to tell."""
    if getattr(made.get_base_model(), "is_quantized", False):
        dtype = next(weight.dtype for weight in given if weight.is_floating_point())
        for weight in set(made.parameters()) - given:
            if weight.is_floating_point():
                weight.data = weight.data.to(dtype)


def no_merge(model: Any) -> str | None:
    """Why this adapter cannot be merged into the weights of its base; None where only the merge itself can tell."""
    if infer.has_virtual_tokens(model):
        return "it puts tokens of its own before the text and leaves the weights as they are"
    if reason := NO_MERGE.get(model.active_peft_config.peft_type.value.lower()):
        return reason
    return None if hasattr(model.base_model, "merge_and_unload") else "PEFT has no merge for it"


def merged(adapted: PeftModel, base: Source, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """`base` in float32 with the adapter of `adapted` merged into its weights, on the CPU.

    Raises ConfigError with PEFT's reason for a method that has no merge.
    """
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder, peft_warnings():
        initialisations.save(adapted, Path(folder))
        whole = load.load_model(base, "float32", "cpu", trust_remote_code=trust_remote_code)
        try:
            made: PreTrainedModel = PeftModel.from_pretrained(whole, folder).merge_and_unload(safe_merge=True)
        except (ValueError, NotImplementedError, AttributeError) as error:
            method, why = adapted.active_peft_config.peft_type.value.lower(), " ".join(str(error).split())
            raise ConfigError("second_phase", f"a {method} adapter cannot be merged: {why}") from None
    return made


def _probe(model: Any) -> torch.Tensor:
    """Logits of a few fixed tokens, to tell whether two models are one."""
    ids = torch.arange(5, 13, device=model.device)[None] % model.config.get_text_config().vocab_size
    training = model.training
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids).logits
    model.train(training)
    return logits


def require_base(tuned: Artifact, base: Source) -> None:
    """Raises ArtifactError when `tuned` was trained on other weights or another tokenizer or chat template than `base` has."""
    trained_on = tuned.manifest["base"]
    if trained_on["words_sha256"] != base.words_sha256 and trained_on["sha256"] == base.sha256:
        raise ArtifactError(
            f"{base.folder}: its tokenizer or chat template was changed since {tuned.path} was trained on it"
        )
    if trained_on["sha256"] != base.sha256:
        raise ArtifactError(
            f"{tuned.path}: was trained on {trained_on['id']} (weights {trained_on['sha256'][:12]}), "
            f"and this base is {base.name} (weights {base.sha256[:12]}); use the base it was trained on"
        )


def refuse_pickles(folder: Path) -> None:
    pickled = [file.name for file in folder.glob("*") if file.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
    if pickled:
        raise ArtifactError(f"{folder / pickled[0]}: pickled weights can run code when read; safetensors are needed")
