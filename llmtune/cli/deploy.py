"""`llmtune merge` and `llmtune chat`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtune import artifact
from llmtune.errors import ConfigError, DataError, UserError
from llmtune.progress import say


def merge(arguments: argparse.Namespace) -> int:
    artifact.finished_run(arguments.run_folder)
    from llmtune.export import merge as merging

    made = merging.run(arguments.run_folder, arguments.dtype)
    found = made.manifest["proof"]
    algebra, storage = found["algebra"], found["storage"]
    if "bases" in made.manifest:
        _say_bases(made.manifest["bases"], found["distance"])
    say(
        f"\nproven: in float32 the merged logits differ by {algebra['max_logit_difference']:.1e} (at most {algebra['tolerance_logit']:g}); "
        f"stored in {found['dtype']}, KL {storage['kl']:.2e} is {storage['ratio']:.2f} x the noise of that dtype (at most 1.5), "
        f"held-out loss {storage['loss_adapter']:.4f} -> {storage['loss_merged']:.4f}"
    )
    print(made.path)
    return 0


def _say_bases(bases: dict[str, Any], distance: dict[str, Any]) -> None:
    """Which base the adapter of a quantised one went into and why, and how far the result is from what was evaluated."""
    losses = ", ".join(f"{loss:.4f} on the {name}" for name, loss in bases["losses"].items())
    by = ""
    if "interval" in bases:
        low, high = bases["interval"]
        by = f"; the first less the second {bases['difference']:+.4f}, 90 % interval [{low:+.4f}, {high:+.4f}]"
    say(f"\nmerged into the {bases['taken']}: held-out loss {losses}{by}")
    say(
        f"against what was evaluated, on the quantised base: KL {distance['kl']:.2e}, held-out loss "
        f"{distance['loss_evaluated']:.4f} -> {distance['loss_stored']:.4f}, worse by {distance['loss_bound']:.4f} at most "
        f"(less than {distance['loss_limit']:g})"
    )


def chat(arguments: argparse.Namespace) -> int:
    run: Path = arguments.run_folder
    speakers = _speakers(run, arguments.arm)
    histories: dict[str, list[dict[str, str]]] = {name: [] for name in speakers.names}
    for message in _messages(arguments):
        if message == "/new":
            histories = {name: [] for name in speakers.names}
            continue
        asked = f"{arguments.instruction}\n\n{message}" if arguments.instruction else message
        for name, turns in histories.items():
            turns.append({"role": "user", "content": asked})
            say_label(name)
            turns.append({"role": "assistant", "content": speakers.answer(name, turns, arguments.max_new_tokens)})
    return 0


class _Speakers:
    """The models that answer, by the name shown beside what they say."""

    def __init__(self, tokenizer: Any, models: dict[str, Any], adapted: Any = None) -> None:
        self.tokenizer, self._models, self._adapted = tokenizer, models, adapted
        self.names = list(models)

    def answer(self, name: str, turns: list[dict[str, str]], max_new_tokens: int) -> str:
        """Stream an answer to stdout, and return it."""
        import contextlib

        import torch
        from transformers import TextStreamer

        from llmtune.data.tokens import encode_prompt
        from llmtune.model.infer import greedy_settings, neutral

        try:
            model, ids = self._models[name], encode_prompt(self.tokenizer, turns)
        except ValueError as error:
            raise DataError("message", str(error)) from None
        settings = greedy_settings(model, self.tokenizer, max_new_tokens)
        off = model.disable_adapter() if name == "base" and model is self._adapted else contextlib.nullcontext()
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        inputs = torch.tensor([ids], device=model.device)
        with off, torch.inference_mode(), neutral(model, settings):
            out = model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=settings, streamer=streamer
            )
        return str(self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


def _speakers(run: Path, arm: str) -> _Speakers:
    merged = arm == "merged" or (not (run / "adapter").is_dir() and (run / "merged").is_dir())
    made = artifact.read(run / "merged", "model") if merged else artifact.finished_run(run)
    from llmtune.model import adapters, load

    base = load.find_again(made.manifest["base"])
    if made.kind == "adapter":
        model = adapters.attach(load.load_model(base), base, made)
        names = ["base", "tuned"] if arm == "both" else [arm]
        return _Speakers(load.load_tokenizer(base), dict.fromkeys(names, model), adapted=model)
    source = load.find(str(made.path))
    models = {} if arm == "base" else {"merged" if made.path.name == "merged" else "tuned": load.load_model(source)}
    if arm in {"both", "base"}:
        models = {"base": load.load_model(base), **models}
    return _Speakers(load.load_tokenizer(source), models)


def _messages(arguments: argparse.Namespace) -> Iterator[str]:
    """What the user says: a file, all of a piped stdin, or line by line at a prompt (a pasted text is one message)."""
    if arguments.file:
        try:
            yield arguments.file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(arguments.file, "no such file") from None
        except (UnicodeDecodeError, IsADirectoryError) as error:
            raise DataError(arguments.file, f"is not a text file ({error})") from None
    elif not sys.stdin.isatty():
        text = sys.stdin.read().strip()
        if not text:
            raise UserError("chat: standard input is empty; type a message, or name a --file")
        yield text
    else:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))

        say(
            "A pasted text is one message; Esc then Enter starts a new line. /new forgets the conversation, Ctrl-D ends it."
        )
        session: Any = PromptSession(key_bindings=keys)
        while True:
            try:
                text = session.prompt("you    > ").strip()
            except EOFError:
                return
            if text:
                yield text


def say_label(name: str) -> None:
    print(f"{name:<7}> ", end="", flush=True)
