"""What every test may lean on: no network, a cache of its own, the tiny model on disk, and rows to train on."""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

# read once, when the libraries are imported: set here, before any test module is
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a tiny model is slower on more

# a shell that starts the tests in the background has Ctrl-C ignored, and a run keeps what was ignored when it began
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing is read from or written to the user's caches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The tiny model as a plain transformers folder. Shared by all tests: copy it to change it."""
    import tiny

    return tiny.save(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def chat_rows():
    """`chat_rows(folder, n)` writes `folder/train.jsonl`, n short conversations, and returns its path."""

    def write(folder: Path, n: int = 8, name: str = "train.jsonl") -> Path:
        turns = [
            [{"role": "user", "content": f"add {i} and 1"}, {"role": "assistant", "content": f"it is {i + 1}"}]
            for i in range(n)
        ]
        file = folder / name
        file.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def small_disk():
    """`with small_disk(folder, kilobytes):` mounts a disk of that size at `folder`; skips where this user may not."""

    @contextlib.contextmanager
    def mounted(folder: Path, kilobytes: int):
        folder.mkdir(parents=True, exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs root")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)

    return mounted
