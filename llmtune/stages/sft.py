"""Supervised fine-tuning: `llmtune sft CONFIG`, or `accelerate launch -m llmtune sft CONFIG`, in one process.

One run, top to bottom: data, base model, adapter, trainer, train, artifact.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

from llmtune import artifact, plots
from llmtune.artifact import Artifact
from llmtune.config import Recorded
from llmtune.config.sft import SftConfig
from llmtune.errors import ConfigError, UserError
from llmtune.model import freeze, load, quantised
from llmtune.progress import say
from llmtune.training import arguments, checkpoints, loop, rows, setup, workspace


def run(config: SftConfig, place: object = "config") -> Artifact:
    """Fine-tune `config.model` on `config.data` and write the result to `config.output_dir`.

    Only assistant turns carry loss. With `config.adapter` the artifact is `output_dir/adapter`; without it, a whole model in
    `output_dir/model`.
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
    with workspace.hold(output, place):
        prints = rows.fingerprints(view.data)
        base = load.find(view.model.name, quantize=view.model.quantize, trust_remote_code=view.model.trust_remote_code)
        quantised.require_trainable(base, device, view.adapter and view.adapter.method, place)
        if warning := base.licence_warning:
            say(f"  licence: {warning}")
        tokenizer = load.load_tokenizer(base, trust_remote_code=view.model.trust_remote_code)
        folder = output / "checkpoints"
        checkpoints.claim(folder, checkpoints.identity(config.model_dump(mode="json"), prints, base.facts()), place)
        try:
            train, validation = rows.encode_splits(view.data, tokenizer, folder, place)
            model = setup.build_model(view, base, device, place)
            trainer = setup.build_trainer(view, model, tokenizer, train, validation, folder, device, place)
            rows.assert_nothing_lost(trainer.train_dataset, train.counts)
            view.require_all_read(place)
        except UserError:
            if not checkpoints.last_complete(folder):
                shutil.rmtree(folder)  # nothing to go on from
            raise
        metrics = loop.train(trainer, folder)
        remote = view.model.trust_remote_code
        tuned = trainer.model if config.adapter else freeze.whole(trainer.model, base, trust_remote_code=remote)
        with artifact.writing(target, "adapter" if config.adapter else "model") as draft:
            draft.facts.update(
                config=config.model_dump(mode="json", exclude_none=True),
                base={**base.facts(), "dtype": str(tuned.dtype).removeprefix("torch.")},
                data=rows.facts(prints, train, validation),
                template_sha256=hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
                seeds={"seed": view.train.seed},
                metrics=metrics,
                **({"trained": freeze.trained(trainer.model)} if config.trainable else {}),
            )
            tuned.save_pretrained(draft.path, safe_serialization=True)
            tokenizer.save_pretrained(draft.path)
            (draft.path / "README.md").unlink(missing_ok=True)  # PEFT's empty card
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8")
            (draft.path / "metrics.jsonl").write_text(lines, encoding="utf-8")
            svg = plots.curves_svg([json.loads(line) for line in lines.splitlines()])
            (draft.path / "curves.svg").write_text(svg, encoding="utf-8")
    shutil.rmtree(folder)
    return artifact.read(target)
