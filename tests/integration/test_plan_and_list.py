"""`llmtune plan` before a run and `llmtune runs` after it, as a user types them."""

import json


def test_plan_then_train_then_list(llmtune, run_file, tmp_path):
    shown, data = llmtune("plan", run_file), llmtune("plan", run_file, "--json")
    assert (shown.code, data.code) == (0, 0)
    said = {line.split()[0]: line for line in shown.out.splitlines()}
    assert list(said)[:7] == ["model", "trained", "rows", "steps", "work", "time", "memory"]
    assert "fits" in said["peak"]
    assert "not known" in said["time"]
    assert json.loads(data.out)["run"]["steps"] == 2
    assert not (tmp_path / "run").exists()

    assert llmtune("sft", run_file, f"output_dir={tmp_path / 'runs' / 'first'}").code == 0
    again = llmtune("plan", run_file, f"output_dir={tmp_path / 'runs' / 'second'}")
    assert "measured in first" in again.out
    assert llmtune("runs", tmp_path / "runs").out.splitlines()[1].startswith("first ")
    (listed,) = json.loads(llmtune("runs", tmp_path / "runs", "--json").out)
    assert (listed["state"], listed["steps"]) == ("finished", 2)
    same = llmtune("runs", "diff", tmp_path / "runs" / "first", tmp_path / "runs" / "first", "--json")
    assert json.loads(same.out)["config"] == {}
    assert llmtune("runs", "diff", "one").code == 2
    assert llmtune("runs", "one", "two").code == 2
    assert llmtune("runs", tmp_path / "nowhere").message.endswith("lists the runs in DIR\n")


def test_plan_of_a_model_alone(llmtune, run_file, tiny_folder):
    small = ["--length", "32", "--gpus", "1,8"]
    table = llmtune("plan", "--model", tiny_folder / "config.json", *small)
    assert table.code == 0
    rows = [line.split()[0] for line in table.out.splitlines() if " off " in line]
    assert rows == ["full", "LoRA", "QLoRA"]  # it has no four top blocks
    assert "first fits on 1 GPU, activation checkpointing off" in table.out
    assert json.loads(llmtune("plan", "--model", tiny_folder, *small, "--json").out)["parameters"] > 90_000
    assert llmtune("plan").message == "plan: takes a run file, or a model by --model\n"
    assert llmtune("plan", run_file, "--model", tiny_folder).code == 2
    assert llmtune("plan", "--model", run_file).code == 2
    assert llmtune("plan", "--model", tiny_folder, "--gpus", "one").code == 2
