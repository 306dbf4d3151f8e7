"""Supervised fine-tuning: `llmtune sft CONFIG`, with `--processes N` or under `accelerate launch -m`, in one process or several.

One run, top to bottom: data, base model, adapter, trainer, train, artifact.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtune import artifact, plots, ranks
from llmtune.artifact import Artifact
from llmtune.config import Recorded
from llmtune.config.sft import SftConfig
from llmtune.config.train import require_divisible
from llmtune.errors import ConfigError, UserError
from llmtune.interruption import Interruption
from llmtune.model import adapters, infer, load, quantised, saved
from llmtune.progress import say
from llmtune.training import checkpoints, group, optim, packing, phases, resume, rows, setup, watch, workspace


def run(
    config: SftConfig, place: object = "config", *, other_versions: bool = False, callbacks: Sequence[Any] = ()
) -> Artifact:
    """Fine-tune `config.model` on `config.data` and write the result to `config.output_dir`.

    Only assistant turns carry loss. With `config.adapter` the artifact is `output_dir/adapter`; without it, a whole model in
    `output_dir/model`.
    An interrupted run goes on from its last whole checkpoint, with `other_versions` also under other versions of the
    libraries; SIGTERM ends it with Preempted, Ctrl-C with KeyboardInterrupt. Raises ConfigError or DataError before any
    weight is loaded, where it follows from run file and rows; what only PEFT or transformers can tell comes after.
    `callbacks` are transformers' own kind, called after those of llmtune.
    Of several processes the first writes the artifact, and each returns it.
    """
    seen: set[str] = set()
    views = [Recorded(phase, seen=seen) for phase in config.phases()]
    view = views[0]
    assert view.stage == "sft"
    output = Path(view.output_dir)
    kind = config.makes
    target = output / kind
    folder = output / "checkpoints"
    if target.exists():
        artifact.read(target)  # names what is wrong with it, if anything
        resume.clear(folder)  # of a run that was killed at its very end
        raise ConfigError(
            place, f"output_dir: {target} is finished already; choose another output_dir, or move it away"
        )
    require_divisible(config.train, ranks.world_size(), place)
    phases.check(config, place)
    group.check(view, place)
    for tracker in view.tracking:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(place, f"tracking: {tracker} is not installed; pip install 'llmtune[{tracker}]'")
    device = load.choose_device(view.model.device)
    for phase in config.phases():
        optim.check(phase.train, device, place)
    load.require_attention(view.model.attention, device, place)
    with Interruption() as stop, workspace.hold(output, place):
        prints = rows.fingerprints(view.data)
        base = load.find(view.model.name, quantize=view.model.quantize, trust_remote_code=view.model.trust_remote_code)
        for one in views:
            quantised.require_trainable(base, device, one.adapter and one.adapter.method, place)
        if warning := base.licence_warning:
            say(f"  licence: {warning}")
        tokenizer = load.load_tokenizer(base, trust_remote_code=view.model.trust_remote_code)
        watching = view.train.refusal_watch
        watched = watch.read(watching.whole(), tokenizer, place) if watching is not None else None
        try:
            with workspace.prepared(output) as first:
                if first:
                    identity = resume.identity(config.model_dump(mode="json"), prints, base.facts(), device)
                    resume.claim(folder, identity, place, other_versions=other_versions)
                    train, validation = rows.encode_splits(view.data, tokenizer, folder, place)
                else:
                    train, validation = rows.read_splits(view.data, folder)
            setup.rehearse(views, base, place)
            group.join(device)
            batches = packing.layout(view, train)
            given = phases.Given(tokenizer, train, validation, folder, device, stop, place, callbacks, watched)
            tuned = phases.train(views, base, given)
        except UserError:
            if not checkpoints.begun(folder):
                resume.clear(folder)  # nothing to go on from
            raise
        facts = {
            "config": config.model_dump(mode="json", exclude_none=True),
            "base": base.facts(),
            "data": rows.facts(prints, train, validation) | {"batches": batches},
            "template_sha256": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
            "seeds": {"seed": view.train.seed},
            "processes": ranks.world_size(),
            **tuned.facts,
        }
        made = group.from_first(lambda: _write(target, kind, tuned, tokenizer, folder, facts))
    if ranks.local_rank() == 0:
        resume.clear(folder)
    return made


def _write(
    target: Path, kind: artifact.Kind, tuned: phases.Tuned, tokenizer: Any, folder: Path, facts: dict[str, Any]
) -> Artifact:
    model = tuned.model()
    with artifact.writing(target, kind) as draft:
        draft.facts.update(facts)
        draft.facts["base"]["dtype"] = str(model.dtype).removeprefix("torch.")
        if end := infer.stop_at_end_of_turn(model, tokenizer):
            say(
                f"  the chat template ends a turn with {end!r}, at which the model's generation config does not stop: it is in"
            )
            say("  the generation_config.json of the result; what serves it must stop there")
            if kind == "adapter":
                model.get_base_model().generation_config.save_pretrained(draft.path)
        if kind == "adapter":
            adapters.save(model, draft.path)
        else:
            model.save_pretrained(draft.path, safe_serialization=True)
        saved.require_whole(draft.path, model)
        tokenizer.save_pretrained(draft.path)
        (draft.path / "README.md").unlink(missing_ok=True)  # PEFT's empty card
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        (draft.path / "metrics.jsonl").write_text(lines, encoding="utf-8")
        svg = plots.curves_svg([json.loads(line) for line in lines.splitlines()])
        (draft.path / "curves.svg").write_text(svg, encoding="utf-8")
    return artifact.read(target)
