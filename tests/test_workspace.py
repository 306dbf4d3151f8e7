"""The folder that a run holds while it trains."""

from pathlib import Path

import pytest

from llmtune.errors import ConfigError
from llmtune.training import workspace


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_folder_that_cannot_be_made_is_named_with_the_reason(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / inside
    with pytest.raises(ConfigError, match=r"output_dir: .*file"), workspace.hold(folder, "sft.yaml"):
        pass


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write where nobody else may
    with (
        pytest.raises(ConfigError, match=r"cannot be written to \(Permission denied\); choose another"),
        workspace.hold(tmp_path, "sft.yaml"),
    ):
        pass
