"""`llmtune plan`: what a run would take, or what each strategy takes for a model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from llmtune import config
from llmtune.errors import UserError

PARTS = ("process", "weights", "trained", "optimizer", "gradients", "activations", "loss", "workspace")


def plan(arguments: argparse.Namespace) -> int:
    if (arguments.config is None) == (arguments.model is None):
        raise UserError("plan: takes a run file, or a model by --model")
    if arguments.model is not None:
        from llmtune import plan as plans

        numbers, memory = arguments.gpus, arguments.gpu_memory_gb * 2**30
        shape = plans.shape_of(arguments.model)
        table = plans.strategies(shape, numbers, memory, arguments.micro_batch_size, arguments.length)
        sys.stdout.write(json.dumps(table, indent=1) + "\n" if arguments.json else _strategies(table))
        return 0
    settings = config.load(arguments.config, arguments.overrides, "sft")
    from llmtune import plan as plans

    found = plans.of_run(settings, arguments.config, _earlier(Path(settings.output_dir).parent))
    if arguments.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        sys.stdout.write(_run(found, arguments))
        if "second_phase" in found:
            sys.stdout.write(f"\nthen, as the second phase\n{_run(found['second_phase'], arguments)}")
    return 0


def _earlier(folder: Path) -> list[dict[str, Any]]:
    """Finished runs beside this one, newest first."""
    from llmtune import runs

    return [run.model_dump() for run in runs.find(folder) if run.state == "finished"] if folder.is_dir() else []


def _run(found: dict[str, Any], arguments: argparse.Namespace) -> str:
    from llmtune.plan import gigabytes, minutes

    model, data, run, batch, memory = (found[key] for key in ("model", "data", "run", "batch", "memory"))
    share = model["trained"] / model["parameters"]
    quantised = f", weights in {model['quantize']}" if model["quantize"] else ""
    time = (
        f"{minutes(run['seconds'])} of training steps ({run['basis']})"
        if run["seconds"]
        else (
            "not known: no run of this base and method lies beside this one. A short one measures it: "
            f"llmtune sft {arguments.config} train.max_steps=5 train.epochs=null output_dir=DIR-BESIDE"
        )
    )
    device = found["device"]
    how = f"processes {run['processes']} x micro batch {run['micro_batch_size']} x accumulation {run['accumulation']}"
    lines = [
        f"model      {model['parameters']:,} parameters, {model['dtype']}{quantised}",
        f"trained    {model['trained']:,} ({share:.2%}): {model['method']}",
        f"rows       {data['rows']:,}: {data['tokens']:,} tokens, {data['supervised_tokens']:,} supervised, the longest {data['longest']}",
        f"steps      {run['steps']:,} of {run['batch_size']} rows ({how})",
        f"work       {run['tokens']:,} tokens, {run['flops']:.2g} floating point operations",
        f"time       {time}",
        f"memory     GB at the peak, in a micro batch of {batch['rows']} x {batch['length']} tokens",
    ]
    note = {"gradients": "  (not beside activations: the larger of the two counts)" if run["accumulation"] == 1 else ""}
    lines += [f"  {part:<12}{gigabytes(memory[part]):>9}{note.get(part, '')}" for part in PARTS if memory[part]]
    fits = "fits" if device["fits"] else "does NOT fit with room to spare"
    lines.append(
        f"  {'peak':<12}{gigabytes(memory['peak']):>9}  {fits}: {device['kind']} with {gigabytes(device['available'])} GB free"
    )
    if not device["fits"]:
        lines.append(f"fits       {_proposal(found['proposal'], arguments.config)}")
    lines.append(f"strategy   {found['strategy']}")
    return "\n".join(lines) + "\n"


def _proposal(proposal: dict[str, Any] | None, file: Path) -> str:
    from llmtune.plan import gigabytes

    if proposal is None:
        return "nothing here: a smaller model, shorter rows (data.max_length), or a larger machine"
    return f"{gigabytes(proposal['peak'])} GB: llmtune sft {file} {' '.join(proposal['overrides'])}"


def _strategies(table: dict[str, Any]) -> str:
    from llmtune.plan import gigabytes

    lines = table["lines"]
    columns = list(dict.fromkeys((line["gpus"], line["sharding"]) for line in lines))
    text = [
        f"{table['parameters']:,} parameters; bfloat16, AdamW, micro batch {table['micro']} x {table['length']} tokens",
        "GB on each GPU; * fits",
        "",
        f"{'':<14}{'checkpointing':<15}"
        + "".join(f"{f'{n} GPU' if n == 1 else f'{n} {word}':>12}" for n, word in columns),
    ]
    for name in dict.fromkeys(line["strategy"] for line in lines):
        for checkpointing in (False, True):
            cells = {
                (line["gpus"], line["sharding"]): f"{gigabytes(line['peak'])}{'*' if line['fits'] else ' '}"
                for line in lines
                if (line["strategy"], line["activation_checkpointing"]) == (name, checkpointing)
            }
            row = "".join(f"{cells.get(column, '- '):>12}" for column in columns)
            text.append(f"{name:<14}{'on' if checkpointing else 'off':<15}{row}")
    text.append("")
    for name in dict.fromkeys(line["strategy"] for line in lines):
        line = table["first"].get(name)
        how = (
            "fits on none of these"
            if line is None
            else (
                f"first fits on {line['gpus']} GPU{'s by ' + line['sharding'] if line['gpus'] > 1 else ''}, "
                f"activation checkpointing {'on' if line['activation_checkpointing'] else 'off'}: {gigabytes(line['peak'])} GB"
            )
        )
        text.append(f"{name:<14}{how}")
    return "\n".join(text) + "\n"
