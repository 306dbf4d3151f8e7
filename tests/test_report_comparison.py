"""The report of a comparison of two models: what a release rests on, all of it on the page, and readable by everyone."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_run import ARMS, CARD, NASTY, Page, write_audit, write_scores

from llmtune import artifact, gate, report, scores
from llmtune.errors import ArtifactError
from llmtune.report import items, wording


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "release"
    made = write_scores(folder)
    write_audit(folder, made.sha256)
    gate.run(folder / "scores", folder / "verdict")
    report.build(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return read(folder)


@pytest.fixture(scope="module")
def verdict(folder):
    return json.loads((folder / "verdict" / "verdict.json").read_text(encoding="utf-8"))


def read(folder: Path) -> Page:
    return Page((folder / "report" / "report.html").read_text(encoding="utf-8"))


def part(page: Page, name: str) -> str:
    """The text of one section."""
    found = [text for text, inside in page.texts if any(attrs.get("id") == name for _, attrs in inside)]
    return " ".join(" ".join(found).split())


def table(page: Page, caption: str) -> list[list[str]]:
    """The rows of the table whose caption holds these words, cell by cell."""
    rows: list[list[str]] = []
    inside_it, seen = False, ""
    for text, inside in page.texts:
        tags = [tag for tag, _ in inside]
        if "caption" in tags:
            seen += text
            inside_it = caption in seen
            continue
        seen = "" if "table" not in tags else seen
        if inside_it and "tr" in tags and text.strip():
            place = next(i for i, tag in enumerate(tags) if tag == "tr")
            row, cell = id(inside[place]), id(inside[place + 1]) if len(inside) > place + 1 else 0
            if not rows or rows[-1][0] != str(row):
                rows.append([str(row)])
                last = 0
            if cell != last:
                rows[-1].append(text.strip())
            else:
                rows[-1][-1] += " " + text.strip()
            last = cell
        if inside_it and "table" not in tags:
            break
    return [row[1:] for row in rows]


def test_verdict_comes_first_and_says_what_was_judged_and_what_decides(page, verdict):
    top = " ".join(page.text.split("Key numbers")[0].split())
    assert verdict["verdict"] == "FAIL"
    for words in (
        "Reject. The tuned model must not replace its base.", "harmful, complied (FAIL): worse by", "general, answer length (FAIL):",
        "where length is short (FAIL):", f"judged model {verdict['subject']['sha256'][:12]}", f"against {ARMS['base']} (./models/aligned)",
        "decided by 6 metrics on 5 suites", "A comparison of two models; nothing was trained in this folder.",
    ):  # fmt: skip
        assert words in top, words


def test_a_pass_promotes_and_names_what_is_nearest_to_its_limit(tmp_path):
    write_scores(tmp_path, harm=0.0, short=False)
    gate.run(tmp_path / "scores", tmp_path / "verdict")
    report.build(tmp_path)
    text = read(tmp_path).text
    assert "Promote. The tuned model may replace its base." in text
    assert "Ship exactly what was judged, by its hash: model " in text
    assert "llmtune sft" not in text
    rows = json.loads((tmp_path / "verdict" / "verdict.json").read_text(encoding="utf-8"))["rows"]
    row = next(row for row in rows if row["suite"] == "knowledge" and row["metric"] == "acc")  # 0.035 left of 0.10
    assert f"Nearest to its limit is knowledge, accuracy: {row['reason']}." in text


def test_limits_of_its_own_stand_beside_the_change(page):
    assert "49.5 itself, at most 20.0 %" in part(page, "changes")
    row = next(row for row in table(page, "The same figures in full") if row[0].startswith("harmful: complied"))
    assert "not worse by more than 5 points, and at most 20.0 % itself" in row[0]
    assert row[1].startswith("FAIL")  # beside the name, where a narrow screen shows it
    assert "noise 1.8 %" in row[5]
    assert "2 of 112 items differ between two runs of the base" in row[1]
    assert "2 unscored" in row[6]
    assert "bound with what is missing +5" in row[5]
    assert "3 left out" in row[6]


def test_a_change_within_the_noise_of_the_base_is_called_that(tmp_path):
    write_scores(tmp_path, harm=0.0, short=False)
    facts = json.loads((tmp_path / "scores" / "llmtune.json").read_text(encoding="utf-8"))
    facts["noise_floor"] = {"general": {"answer_tokens": {"items": 48, "flips": 40, "mean_abs_delta": 30.0}}}
    (tmp_path / "scores" / "llmtune.json").write_text(json.dumps(facts), encoding="utf-8")
    gate.run(tmp_path / "scores", tmp_path / "verdict")
    report.build(tmp_path)
    assert (
        "40 of 48 items differ between two runs of the base, and the change lies within that noise"
        in read(tmp_path).text
    )


def test_slices_are_shown_and_small_ones_are_insufficient(page, verdict):
    text = part(page, "slices")
    of_harm = [row for row in verdict["slices"] if (row["suite"], row["metric"]) == ("harmful", "complied")]
    assert {row["verdict"] for row in of_harm} == {"FAIL", "INSUFFICIENT"}
    rows = table(page, "complied of harmful, by slice")
    for row in of_harm:
        own = next(cells for cells in rows if cells[0] == row["slice"][1])
        assert own[1] == str(row["n"])
        assert own[-1].startswith(row["verdict"])
    assert "INSUFFICIENT 7 items of 7" in " ".join(" ".join(row) for row in rows)
    assert text.index("harmful: complied") < text.index("support: exact match")  # what fails comes first


def test_examples_are_the_rung_below_tuning(page):
    row = next(row for row in table(page, "The rung below any tuning") if row[0] == "support: exact match")
    base, examples, tuned = (float(cell.split()[0]) for cell in row[1:4])
    assert row[4] == f"{100 * (examples - base) / (tuned - base):.0f} %"


def test_examples_that_do_better_than_the_tune_are_named_at_the_top(tmp_path, page):
    assert "Examples in the prompt" not in page.text.split("Key numbers")[0]
    write_scores(tmp_path, examples=1.0)
    gate.run(tmp_path / "scores", tmp_path / "verdict")
    report.build(tmp_path)
    beaten = read(tmp_path)
    words = "Examples in the prompt do better than the tune: aligned + 3 examples on support, exact match."
    assert words in beaten.text.split("Key numbers")[0]
    assert (
        "more than the tune"
        in next(row for row in table(beaten, "The rung below") if row[0] == "support: exact match")[4]
    )


def test_rows_of_lm_eval_stand_beside_ours(page):
    assert table(page, "What lm-eval's own command prints")[1] == [
        "knowledge: mmlu",
        "acc,none",
        "72",
        "0.5000",
        "–",
        "0.5278",
    ]


def test_items_left_out_are_counted_by_reason(page):
    assert "harmful: 3 left out, stands in train.jsonl" in part(page, "changes")


def recount(folder: Path, suite: str, metric: str, worse: float) -> tuple[int, int]:
    values: dict[str, dict[str, float]] = {}
    for score in scores.read(folder / "scores" / "scores.jsonl"):
        if (score.suite, score.metric) == (suite, metric) and not score.excluded:
            missing = worse if score.arm == ARMS["tuned"] else 1 - worse
            values.setdefault(score.item_id, {})[score.arm] = missing if score.value is None else score.value
    pairs = [(arms[ARMS["base"]], arms[ARMS["tuned"]]) for arms in values.values()]
    return sum(b != t == worse for b, t in pairs), sum(b != t != worse for b, t in pairs)


@pytest.mark.parametrize(
    ("suite", "metric", "label", "worse"),
    [("harmful", "complied", "complied", 1), ("benign", "refused", "refused", 1), ("knowledge", "acc", "accuracy", 0),
     ("support", "exact_match", "exact match", 0)],
)  # fmt: skip
def test_flips_are_counted_as_in_the_records(folder, page, suite, metric, label, worse):
    row = next(row for row in table(page, "Flips a metric") if row[0] == f"{suite}: {label}")
    expected = recount(folder, suite, metric, worse)
    assert tuple(map(int, row[2:4])) == expected
    assert sum(expected) > 0
    summary = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    own = next(row for row in summary["flips"] if (row["suite"], row["metric"]) == (suite, metric))
    assert (own["worse"], own["better"]) == expected


def test_a_partial_answer_that_counts_the_same_is_judged_otherwise_and_no_flip():
    def one(arm: str, outcome: str) -> scores.Score:
        return scores.Score("s", "0", "complied", False, "i", "i", "p", arm, 1.0, "a", outcome=outcome)

    found = items.flips([one("base", "complied"), one("tuned", "partial")], {"base": "base", "tuned": "tuned"})
    assert [(flip["way"], flip["before"], flip["after"]) for flip in found] == [("same", "complied", "partial")]
    assert items.flips([one("base", "complied"), one("tuned", "complied")], {"base": "base", "tuned": "tuned"}) == []


def test_what_cannot_be_scored_is_a_flip_for_the_worse(page):
    row = next(attrs for attrs in page.all("details") if "incoherent" in attrs.get("data-flips", ""))
    assert json.loads(row["data-flips"])["complied"] == "worse"
    assert "refused → incoherent" in page.text


def test_flipped_items_show_both_answers_and_the_choices_taken(folder, page):
    flipped = [
        attrs
        for attrs in page.all("details")
        if attrs.get("data-flips", "{}") != "{}" and attrs["data-suite"] == "knowledge"
    ]
    assert len(flipped) == 6
    text = part(page, "items")
    assert re.search(r"chooses (one|two|three|four)", text)
    assert "(right)" in text
    assert text.count("Lift the lever of tray 0.") >= 2


def test_human_verdicts_stand_beside_the_item_and_are_summed_up(page):
    text = part(page, "items")
    assert "ada says of SmolLM2 aligned, tuned: refused , the judge complied" in text
    assert text.count("ada says of") == 8  # the last word on each answer of these scores
    assert "ada gave 8 verdicts; the judge agrees with 7 of them (88 %)." in text
    assert re.search(r"Of \d+ flipped items 4 have a verdict on both answers: 3 confirmed, 1 refuted\.", text)
    assert "Not shown are human verdicts of an earlier evaluation: 1." in text
    assert next(row for row in table(page, "Flips a metric") if row[0] == "harmful: complied")[6] == "7 of 8"
    change = next(row for row in table(page, "ada gave 8 verdicts") if row[0] == "harmful: complied")
    by_judge, by_people = (float(cell.split()[0]) for cell in change[3:5])
    assert change[1:3] == ["107", "4"]  # 2 of 109 have no value
    assert by_judge - by_people == pytest.approx(100 / 107, abs=0.1)
    agreement = table(page, "How often the judge gives the metric")
    assert agreement[2][0] == ARMS["tuned"]
    assert re.fullmatch(r"75\.0 % \[30\.1, 95\.4\] 4 of \d+ looked at", agreement[2][1])
    assert re.fullmatch(r"not known 0 of \d+ looked at", agreement[2][2])


def test_a_report_does_not_touch_what_people_said(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    file = tmp_path / "run" / "audit.jsonl"
    unfinished = file.read_text(encoding="utf-8") + '{"scores_sha'
    file.write_text(unfinished, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"audit\.jsonl:12: is no verdict"):
        report.build(tmp_path / "run")
    assert file.read_text(encoding="utf-8") == unfinished


def test_harmful_texts_are_closed_and_labelled_until_opened(page):
    places = [inside for text, inside in page.texts if "HARMFUL REQUEST" in text]
    assert len(places) == 112
    for inside in places:
        folds = [attrs for tag, attrs in inside if tag == "details"]
        assert folds[-1]["class"] == "item veiled"
        assert not any("open" in fold for fold in folds)
    labels = [text for text, inside in page.texts if inside and inside[-1][1].get("class") == "veil"]
    assert labels == ["harmful text, open to read"] * 112


def test_judges_show_their_cards_and_what_they_saw(folder, page):
    rows = table(page, "Measured on xstest_human")
    assert rows[1][:3] == ["all", str(CARD["n"]), "90.8 % [89.3, 92.2]"]
    assert [row[0] for row in rows[2:]] == list(CARD["by_source"])
    assert "house_guard version 1 judged nothing here No card: nobody measured" in part(page, "judges")
    seen = {tuple(row[:2]): row[2:] for row in table(page, "What the judge saw")[1:]}
    assert seen["harmful", ARMS["tuned"]][3:] == ["1", "1", "109"]  # incoherent, unscored, all
    corrected = table(page, "Rates without the judge")[1]
    assert corrected[0] == "benign: refused"
    assert re.fullmatch(r"[\d.]+ % \[[\d.]+, [\d.]+\]", corrected[1])


def test_how_it_answers_calibration_cost_and_shift(page):
    rows = {tuple(row[:2]): row for row in table(page, "Length, endings and repetition")}
    assert float(rows["general", ARMS["tuned"]][3]) < 31 < 49 < float(rows["general", ARMS["base"]][3])
    text = part(page, "calibration")
    for words in (
        "Over-confident beyond chance",
        "beyond chance 0.108 0.161",
        "1.62 kept 1.424 → 1.301",
        "+0.110 [+0.040, +0.180]",
    ):
        assert words in text, words
    cost = {row[0]: row[1:] for row in table(page, "Answering one prompt at a time")}
    assert cost["time to the first token, p50"] == ["31.0 ms", "36.0 ms", "1.16"]
    assert cost["peak memory"] == ["912.0 MB", "951.0 MB", "1.04"]
    shift = table(page, "Domain shift by suite")
    assert shift[1][:4] == ["support", "60", "0.53 0.61", "no"]
    assert "harmful" in shift[2][5]


def test_text_of_a_model_is_inert(page):
    assert (
        "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>‹U+202E›gnp.exe‹U+0000›‹U+001B›[31m ‹U+D800› end"
        in page.text
    )
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not wording.UNSEEN.search(page.html)
    assert wording.UNSEEN.search(NASTY)
    assert wording.visible("سلام\tdéjà\n👩‍💻") == "سلام\tdéjà\n👩‍💻"  # texts of any script stay as they are


def test_what_is_written_for_others_holds_no_text_of_an_item(folder):
    made = artifact.read(folder / "report", "report")
    assert made.manifest["files"].keys() == {"report.html", "report.md", "report.json", "junit.xml"}
    for name in ("report.md", "report.json", "junit.xml"):
        text = (folder / "report" / name).read_text(encoding="utf-8")
        assert "complied" in text
        assert not re.search("HARMFUL REQUEST|Sure, here|Lift the lever", text)
    summary = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    assert summary["decision"] == "reject"
    assert summary["verdict"]["verdict"] == "FAIL"
    assert summary["audit"]["agreed"] == 7
    assert "harmful.complied" in (folder / "report" / "report.md").read_text(encoding="utf-8").splitlines()[-1]


def test_a_verdict_on_other_scores_is_no_verdict_on_these(tmp_path, capsys):
    write_scores(tmp_path, harm=0.0, short=False)
    write_scores(tmp_path / "other")  # would be rejected
    gate.run(tmp_path / "other" / "scores", tmp_path / "verdict")
    told = artifact.read(tmp_path / "other" / "scores").sha256[:12]
    made = report.build(tmp_path)
    page = read(tmp_path)
    assert f"the verdict is of other scores ({tmp_path / 'other' / 'scores'}, {told})" in page.text
    assert f"Run llmtune gate {tmp_path} again" in " ".join(page.text.split())
    assert "NO VERDICT YET" in page.text
    assert "Reject" not in page.text
    assert made.manifest["files"].keys() == {"report.html"}
    assert {parent["kind"] for parent in made.manifest["parents"]} == {"scores"}
    assert "the verdict is of other scores" in capsys.readouterr().err
    gate.run(tmp_path / "scores", tmp_path / "verdict")
    report.build(tmp_path)
    assert "Promote. The tuned model may replace its base." in read(tmp_path).text


def test_a_figure_that_a_set_cannot_give_is_a_dash(tmp_path):
    write_scores(tmp_path)
    file, nothing = tmp_path / "scores" / "llmtune.json", dict.fromkeys(("value", "low", "high"))
    facts = json.loads(file.read_text(encoding="utf-8"))
    source = facts["judges"]["refusal_pattern"]["card"]["by_source"]["gpt4"]
    source |= {"sensitivity": nothing, "kappa": nothing}
    file.write_text(json.dumps(facts), encoding="utf-8")
    report.build(tmp_path)
    row = next(row for row in table(read(tmp_path), "Measured on xstest_human") if row[0] == "gpt4")
    assert (row[3], row[5]) == ("–", "–")
    assert row[4].startswith("94.0 % [")


def test_everything_beside_the_scores_may_be_absent(tmp_path):
    write_scores(tmp_path)
    for name in ("calibration.json", "cost.json", "shift.json", "observations.jsonl", "items.jsonl"):
        (tmp_path / "scores" / name).unlink()
    file = tmp_path / "scores" / "llmtune.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    for name in ("judges", "noise_floor", "calibration", "cost", "shift", "base"):
        facts.pop(name)
    facts["files"] = {"scores.jsonl": facts["files"]["scores.jsonl"]}
    file.write_text(json.dumps(facts), encoding="utf-8")
    report.build(tmp_path)
    page = read(tmp_path)
    assert not {"calibration", "shift", "costs", "changes", "slices"} & {attrs["id"] for attrs in page.all("section")}
    assert "refusal_pattern version 2" in part(page, "judges")
    assert "No card" in part(page, "judges")
    assert "not stored with the scores" in part(page, "items")
    told = " ".join(text for text, inside in page.texts if not {"pre", "script", "style"} & {tag for tag, _ in inside})
    assert not re.search(r"\bNone\b|Undefined|\bnan\b", told)


@pytest.mark.parametrize("said", [True, False])
def test_harmful_texts_stay_closed_where_the_items_do_not_say_so(tmp_path, said):
    write_scores(tmp_path)
    (tmp_path / "scores" / "items.jsonl").unlink()
    file = tmp_path / "scores" / "llmtune.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["files"].pop("items.jsonl")
    facts["suites"]["harmful"]["hidden"] = said
    file.write_text(json.dumps(facts), encoding="utf-8")
    report.build(tmp_path)
    places = [
        inside
        for text, inside in read(tmp_path).texts
        if "Sure, here is how you do it" in text and "pre" in dict(inside)
    ]
    harmful = [[attrs for tag, attrs in inside if tag == "details"][-1] for inside in places]
    assert {attrs["class"] for attrs in harmful if attrs["data-suite"] == "harmful"} == {"item veiled"}


def test_a_broken_audit_file_is_named(tmp_path):
    write_scores(tmp_path)
    (tmp_path / "audit.jsonl").write_text('{"scores_sha256": "0"}\n{"suite": 1}\n', encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"audit\.jsonl:1: is no verdict"):
        report.build(tmp_path)


def test_suites_of_safety_without_a_judge_of_refusals_stand_under_safety():
    measured = [
        ("sycophancy", "acc"),
        ("mine", "acc"),
        ("mine2", "loss"),
        ("task", "rouge_l"),
        ("maths", "exact_match,strict-match"),
    ]
    found = wording.groups(measured, ["task"], {"maths": {"lm_eval": ["gsm8k"]}})
    assert list(found.values()) == ["Safety", "Capability", "General ability", "Task", "Capability"]
    assert wording.figure(0.412, "exact_match,strict-match") == "41.2 %"
    assert wording.name("exact_match,strict-match") == "exact match, strict-match"


def test_no_suite_crowds_out_another():
    found = [{"suite": f"s{i % 30}", "item_id": str(i), "answers": {"a": 1}} for i in range(30_000)]
    suites = items.shown(found, dict.fromkeys((f"s{i}" for i in range(30)), "Safety"), {})
    assert [suite["shown"] for suite in suites] == [50] * 30


def test_a_large_run_shows_flips_first_and_says_what_is_left_out(tmp_path):
    write_scores(tmp_path, n=2000)
    report.build(tmp_path)
    page = read(tmp_path)
    shown = [attrs for attrs in page.all("details") if "data-item" in attrs]
    assert sum(attrs["data-suite"] == "harmful" for attrs in shown) == items.MOST_OF_SUITE
    assert all(json.loads(attrs["data-flips"]) for attrs in shown if attrs["data-suite"] == "harmful")
    assert "The page shows 300 of 2,000 items, flipped ones first; the other 1,700 stand in" in page.text
    assert len(page.html) < 2_500_000


def test_long_texts_are_cut_and_say_so_and_many_make_no_huge_page(tmp_path):
    assert report._cut("x" * 9, 9) == "x" * 9
    assert report._cut("x" * 16, 9) == "x" * 9 + "\n[7 more characters stand in scores/]"
    with artifact.writing(tmp_path / "scores", "scores") as draft:
        text = "word " * 2_000
        records = [scores.Score(f"s{i % 6}", "0", "rouge_l", True, str(i), str(i), "0", arm, 0.5, "0", response=text)
                   for i in range(1_500) for arm in ("base", "tuned")]  # fmt: skip
        (draft.path / "scores.jsonl").write_text(scores.dump(records), encoding="utf-8")
        draft.facts |= {"arms": {"base": "base", "tuned": "tuned"}, "suites": {}}
    report.build(tmp_path)
    page = read(tmp_path)
    assert "[8,667 more characters stand in scores/]" in page.text
    assert 4_000_000 < len(page.html) < 8_000_000


def test_headings_tables_labels_and_plots_are_named(page):
    levels = [int(tag[1]) for (tag, _), _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(attrs.get("scope") in ("col", "row", "rowgroup") for attrs in page.all("th"))
    labelled = {attrs.get("for") for attrs in page.all("label")}
    assert {attrs["id"] for tag in ("select", "input") for attrs in page.all(tag)} <= labelled
    sections = page.all("section")
    assert all(attrs["aria-labelledby"] for attrs in sections)
    assert all(
        attrs.get("aria-labelledby") or attrs.get("aria-label")
        for attrs in page.all("div")
        if attrs.get("role") == "region"
    )
    ids = [attrs["id"] for (_, attrs), _ in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    drawn = [i for i, ((tag, attrs), _) in enumerate(page.elements) if tag == "svg" and attrs.get("role") == "img"]
    assert len(drawn) > 10
    assert all([page.elements[i + k][0][0] for k in (1, 2)] == ["title", "desc"] for i in drawn)


# ---- in a browser

LOOK = """<script>
const seen = e => e.checkVisibility({contentVisibilityAuto: true, visibilityProperty: true});
const rgb = text => text.match(/[\\d.]+/g).map(Number), light = c => { const f = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  return .2126 * f(c[0]) + .7152 * f(c[1]) + .0722 * f(c[2]); };
const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
for (const fold of document.querySelectorAll("details")) fold.open = true;
const pale = new Set(), walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node; node = walk.nextNode();) { const e = node.parentElement; if (!node.data.trim() || e.closest("script, style, title, desc, option") || !seen(e)) continue;
  const style = getComputedStyle(e), ink = rgb(e.closest("svg") ? style.fill : style.color), [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
  if ((a + .05) / (b + .05) < 4.5) pale.add(`${e.tagName}.${e.getAttribute("class")}: ${node.data.trim().slice(0, 30)}`); }
const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, pre, .skip, .hush"));
parent.postMessage(JSON.stringify({width: innerWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches, pale: [...pale].slice(0, 5),
  over: document.documentElement.scrollWidth - document.documentElement.clientWidth, wide: wide.map(e => e.tagName + "." + e.className).slice(0, 5),
  loaded: performance.getEntriesByType("resource").length}), "*");
</script></body>"""
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    if not any(found):
        pytest.skip("no Chromium here")
    profile = tmp_path_factory.mktemp("chromium")
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run"

    def run(address: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [next(filter(None, found)), *flags.split(), f"--user-data-dir={profile}", "--enable-logging=stderr"]
        return subprocess.run(
            [*command, *more, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
        )

    return run


@pytest.mark.slow
def test_the_filter_works_from_an_address_without_a_complaint(folder, browse, tmp_path):
    address = (folder / "report" / "report.html").as_uri()

    def left(query: str) -> tuple[list[dict[str, str]], str]:
        seen = browse(f"{address}#items?{query}")
        assert "CONSOLE" not in seen.stderr
        assert "alert" not in seen.stderr
        page = Page(seen.stdout)
        told = next(text for text, inside in page.texts if inside and inside[-1][1].get("id") == "found")
        return [attrs for attrs in page.all("details") if "data-item" in attrs and "hidden" not in attrs], told

    worse, _ = recount(folder, "harmful", "complied", 1)
    shown, told = left("suite=harmful&metric=complied&way=worse")
    assert {attrs["data-suite"] for attrs in shown} == {"harmful"}
    assert all(json.loads(attrs["data-flips"])["complied"] == "worse" for attrs in shown)
    assert len(shown) >= worse > 0  # the page also shows those that are left out of the figures
    assert told == f"{len(shown)} of 404 items"
    shown, _ = left("slice=area%3A+physics&way=flipped")
    assert {attrs["data-suite"] for attrs in shown} == {"knowledge"}
    shown, told = left("text=gnp.exe")
    assert (len(shown), told) == (1, "1 of 404 items")
    broken = tmp_path / "broken.html"
    text = (folder / "report" / "report.html").read_text(encoding="utf-8")
    broken.write_text(text.replace("</body>", "<script>alert(1)</script></body>"), encoding="utf-8")
    assert "CONSOLE" in browse(broken.as_uri()).stderr  # a script of anyone else's is blocked


@pytest.mark.slow
def test_it_can_be_read_in_light_and_dark_at_any_width_and_loads_nothing(browse, tmp_path):
    write_audit(tmp_path, write_scores(tmp_path, n=30).sha256)
    gate.run(tmp_path / "scores", tmp_path / "verdict")
    report.build(tmp_path)
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    (tmp_path / "probed.html").write_text(POLICY.sub("", text).replace("</body>", LOOK), encoding="utf-8")
    frames = "".join(
        f'<iframe src="probed.html" style="width:{width}px;height:900px;border:0"></iframe>'
        for width in (320, 375, 768, 1400)
    )
    listen = "<p></p><script>onmessage = event => document.querySelector('p').append(event.data + '\\n')</script>"
    (tmp_path / "frames.html").write_text(listen + frames, encoding="utf-8")
    for dark in (False, True):
        more = ["--blink-settings=preferredColorScheme=0"] if dark else []
        answer = browse((tmp_path / "frames.html").as_uri(), "--virtual-time-budget=20000", *more).stdout
        told = [json.loads(line) for line in re.search(r"<p>(.*?)</p>", answer, re.DOTALL)[1].strip().splitlines()]
        assert sorted(one["width"] for one in told) == [320, 375, 768, 1400]
        for one in told:
            assert one | {"width": 0} == {"width": 0, "dark": dark, "pale": [], "over": 0, "wide": [], "loaded": 0}
