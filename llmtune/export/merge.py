"""`llmtune merge RUN`: the adapter into its base, proven on what lies on disk, or not written at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmtune import artifact, config
from llmtune.artifact import Artifact
from llmtune.config.data import ColumnMap
from llmtune.data.chats import Chat, load_chats
from llmtune.data.tokens import encode_answer, encode_prompt
from llmtune.errors import ArtifactError, ConfigError, DataError, ProofError
from llmtune.export import candidates, proof
from llmtune.model import adapters, infer, load
from llmtune.progress import say

PROBES, HELD_OUT, TEXTS, TEXT_TOKENS = 12, 32, 6, 24


def run(folder: Path, dtype: str = "auto") -> Artifact:
    """Merge `folder/adapter` into its base and write `folder/merged`: safetensors, tokenizer, chat template, generation config.

    dtype: of the stored weights; "auto" is the base's own. An adapter of a quantised base goes into the better of two plain ones.
    Raises ProofError, and writes nothing, when the result does not equal the adapter within the tolerances of `proof`, naming the
    tensors that differ.
    """
    adapter = artifact.finished_run(folder)
    if adapter.kind != "adapter":
        raise ArtifactError(f"{adapter.path}: is a whole model already; there is nothing to merge")
    if artifact.complete(folder / "merged"):
        raise ArtifactError(f"{folder / 'merged'}: is finished already; move it away to merge again")
    base = load.find_again(adapter.manifest["base"])
    tokenizer = load.load_tokenizer(base)
    evaluated_in = adapter.manifest["base"]["dtype"]
    dtype = evaluated_in if dtype == "auto" else dtype
    chats = _probe_chats(adapter)
    held_out = [_encoded(encode_answer, tokenizer, chat, chat.turns) for chat in chats[:HELD_OUT]]
    probes = [row.input_ids for row in held_out[:PROBES]]

    def readings(model: Any) -> proof.Readings:
        return proof.read_model(model, probes, held_out, tokenizer.pad_token_id)

    say("  proof: the live adapter")
    prompts = [_encoded(encode_prompt, tokenizer, chat, chat.prompt) for chat in chats[:TEXTS]]
    live_model = adapters.attach(load.load_model(base, evaluated_in if base.quantised else dtype), base, adapter)
    assert_mergeable(live_model, adapter)
    evaluated = live = readings(live_model)
    said = infer.generate(live_model, tokenizer, prompts, TEXT_TOKENS, TEXTS)
    del live_model
    chosen, bases = candidates.choose(
        base, adapter, evaluated_in, probes, lambda model: infer.token_losses(model, held_out, tokenizer.pad_token_id)
    )
    if base.quantised:
        live = readings(chosen.attached(base, adapter, dtype))
    reference_model = chosen.attached(base, adapter, "float32")
    reference = readings(reference_model)
    say("  proof: merged in float32")
    merged = merge_into_base(reference_model, adapter)
    algebra = proof.algebra(reference, readings(merged))
    with artifact.writing(folder / "merged", "model", [adapter]) as draft:
        expected = _shared_once(merged)
        infer.stop_at_end_of_turn(merged, tokenizer)
        merged.to(getattr(torch, dtype)).save_pretrained(draft.path)
        tokenizer.save_pretrained(draft.path)
        say("  proof: what lies on disk")
        wrong = proof.differing_tensors(draft.path, expected)
        stored_model = load.load_model(load.find(str(draft.path)), dtype)
        stored = readings(stored_model)
        storage = proof.storage(reference, live, stored)
        distance = proof.distance(evaluated, stored) if base.quantised else None
        again = infer.generate(stored_model, tokenizer, prompts, TEXT_TOKENS, TEXTS)
        if not (algebra.holds and storage.holds and (distance is None or distance.holds)) or wrong:
            raise ProofError(_explain(folder, algebra, storage, distance, wrong))
        _assert_same_words(draft.path, tokenizer, chats)
        shown = zip(chats[:TEXTS], said, again, strict=True)
        texts = [{"prompt": str(c.prompt[-1]["content"]), "adapter": a.text, "merged": m.text} for c, a, m in shown]
        draft.facts.update(
            base=adapter.manifest["base"],
            template_sha256=adapter.manifest["template_sha256"],
            proof=proof.facts(algebra, storage, distance, dtype, texts),
            **({"bases": bases} if bases else {}),
        )
    return artifact.read(folder / "merged")


def _probe_chats(adapter: Artifact) -> list[Chat]:
    """Held-out rows of the run where they still lie as they were, else the shipped general items."""
    data = adapter.manifest["config"]["data"]
    validation = adapter.manifest["data"].get("validation")
    for source in (validation or {}).get("sources", []):
        if Path(source["path"]).is_file() and artifact.sha256_file(Path(source["path"])) == source["sha256"]:
            columns = config.validate(ColumnMap, data["columns"], adapter.path) if "columns" in data else None
            chats = list(load_chats(source["path"], data["format"], columns, training=True))
            if len(chats) >= PROBES:
                return chats
    items = config.shipped("evals", "prompts/general.jsonl")
    return list(load_chats(str(items), columns=ColumnMap(user=["prompt"], assistant="answer"), training=False))


def assert_mergeable(model: Any, adapter: Artifact) -> None:
    """Raises ConfigError with the reason for a method that has no weights of the base to be added to, before any proof is read."""
    if why := adapters.no_merge(model):
        method = adapter.manifest["config"]["adapter"]["method"]
        raise ConfigError(adapter.path, f"a {method} adapter cannot be merged: {why}; serve it as an adapter")


def merge_into_base(model: Any, adapter: Artifact) -> Any:
    """The base with the adapter added into its weights. Raises ConfigError with the reason where there is no such sum."""
    assert_mergeable(model, adapter)
    try:
        return model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError) as error:
        method = adapter.manifest["config"]["adapter"]["method"]
        why = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(adapter.path, f"a {method} adapter cannot be merged: {why}; serve it as an adapter") from None


def _shared_once(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors as they are stored: one that is another is stored once."""
    tensors = model.state_dict()
    named = dict(getattr(model, "all_tied_weights_keys", None) or {})
    # tied by the model's class, but an adapter may have given each its own
    tied = {name for name, source in named.items() if tensors[name].data_ptr() == tensors[source].data_ptr()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items() if name not in tied}


def _encoded(encode: Any, tokenizer: Any, chat: Chat, turns: list[dict[str, Any]]) -> Any:
    try:
        return encode(tokenizer, turns, chat.tools)
    except ValueError as error:
        raise DataError(chat.row.place, str(error)) from None


def _assert_same_words(folder: Path, tokenizer: Any, chats: list[Chat]) -> None:
    """The stored tokenizer and chat template write every probe as the adapter's did."""
    stored = load.load_tokenizer(load.find(str(folder)))
    for chat in chats[:PROBES]:
        first, second = (_encoded(encode_answer, words, chat, chat.turns) for words in (stored, tokenizer))
        if first != second:
            raise ProofError(f"{folder}: the stored tokenizer or chat template encodes {chat.row.place} in another way")


def _explain(
    folder: Path, algebra: proof.Algebra, storage: proof.Storage, distance: proof.Distance | None, wrong: list[str]
) -> str:
    lines = [f"{folder / 'merged'}: the merged model does not equal its adapter, so it was not written"]
    if not algebra.holds:
        lines.append(
            f"  algebra: logits differ by {algebra.max_logit_difference:.2g} (at most {algebra.tolerance_logit:g}), "
            f"KL {algebra.kl:.2g} (at most {algebra.tolerance_kl:g})"
        )
    if not storage.holds:
        lines.append(
            f"  storage: KL {storage.kl:.2g} (at most {storage.limit:.2g}), held-out loss worse by up to "
            f"{storage.loss_bound:.4f} (less than {storage.loss_limit})"
        )
    if distance is not None and not distance.holds:
        lines.append(
            f"  distance: held-out loss {distance.loss_evaluated:.4f} as evaluated, on the quantised base, and {distance.loss_stored:.4f} "
            f"merged: worse by up to {distance.loss_bound:.4f} (less than {distance.loss_limit}); serve the adapter on its base"
        )
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        lines.append(f"  tensors: {', '.join(wrong[:5])}{more}")
    return "\n".join(lines)
