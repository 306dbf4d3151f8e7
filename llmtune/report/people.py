"""What people said of the judge's outcomes: beside the items, and summed up."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmtune import audit
from llmtune.config.metrics import AGAINST, counts
from llmtune.report.items import lines
from llmtune.report.wording import Rows
from llmtune.scores import Score


def verdicts(run: Path, scores_sha256: str | None, records: Iterable[Score]) -> dict[str, Any]:
    """From `audit.jsonl` in the run's folder, of these very scores: each person's last word on an answer, and the summary.

    "said": with whether the judge's outcome gives the metric the same value. "rows": suite and metric -> answers, and on how
    many the judge agrees. "earlier": verdicts on other scores, which take no part. "summary": as `llmtune audit` prints it.
    Raises ArtifactError when something else stands in the file.
    """
    file, metrics = run / audit.FILE, {score.suite: score.metric for score in records if score.metric in AGAINST}
    if scores_sha256 is None or not file.is_file():
        return {"said": [], "rows": [], "n": 0, "agreed": 0, "earlier": 0, "summary": None}
    log = audit.Log(file, scores_sha256, mend=False)
    last = {(one["suite"], one["item_id"], one["arm"], one["by"]): one for one in log.said if one["suite"] in metrics}
    said, by_metric = [], dict[tuple[str, str], list[bool]]()
    for one in last.values():
        metric = metrics[one["suite"]]
        agrees = counts(metric, one["verdict"]) == counts(metric, one["outcome"])
        said.append({**one, "agrees": agrees})
        by_metric.setdefault((one["suite"], metric), []).append(agrees)
    rows: Rows = [{"suite": suite, "metric": metric, "n": len(agreed), "agreed": sum(agreed)}
                  for (suite, metric), agreed in by_metric.items()]  # fmt: skip
    return {
        "said": said,
        "rows": rows,
        "n": len(said),
        "agreed": sum(one["agrees"] for one in said),
        "earlier": sum(one["scores_sha256"] != scores_sha256 for one in lines(file)),
        "summary": audit.summary(audit.load(run / "scores"), log) if said else None,
    }
