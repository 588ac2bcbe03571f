"""Published scores of layers, as a ranking: a CSV file with a column `layer`, then one column per task.

A row is what the model scored without that layer, and the row of layer -1 what the whole model scored. A layer's
importance is what its loss costs: the baseline minus its score, averaged over the tasks. Imports no torch.
"""

import csv
import math
import time
from collections.abc import Sequence
from pathlib import Path

from hybridize.importance.ranking import order_by_score
from hybridize.importance.request import Request, Scores

BASELINE_ROW = -1


def score_by_import(request: Request) -> Scores:
    """Take importance from a file.

    Raises:
        ValueError: the file is missing, malformed, or lacks a layer; names the place, the value and the remedy.
    """
    from hybridize.models import layout_of

    started = time.perf_counter()
    assert request.stage.scores is not None
    num_layers = len(layout_of(request.model.config).layers)
    baseline, scores = read_scores(request.stage.scores, request.layers, num_layers)
    return Scores(order=order_by_score(scores), scores=scores, baseline=baseline, seconds=time.perf_counter() - started)


def read_scores(path: str | Path, layers: Sequence[int], num_layers: int) -> tuple[float, dict[int, float]]:
    """Read the importance of layers.

    Args:
        path: of the CSV file.
        layers: those that are attention still. Each must be in the file; of other layers' rows no notice is taken.
        num_layers: of the model.

    Returns:
        The baseline, averaged over the tasks; and by layer, by how much it falls without it.

    Raises:
        ValueError: the file is missing, is no such table, has no baseline row, or lacks some of `layers`.
    """
    tasks, rows = _read_table(Path(path), num_layers)
    if BASELINE_ROW not in rows:
        raise ValueError(
            f"{path}: it has no row of layer {BASELINE_ROW}, what the whole model scored; add one with a score for "
            f"each of {', '.join(tasks)}"
        )
    missing = [layer for layer in layers if layer not in rows]
    if missing:
        raise ValueError(
            f"{path}: it has no score for layers {missing}, which are attention still; add a row for each "
            "(a row of zeros ranks a layer last, so that it is kept longest)"
        )
    baseline = rows[BASELINE_ROW]
    lost = {
        layer: sum(whole - score for whole, score in zip(baseline, rows[layer], strict=True)) / len(tasks)
        for layer in layers
    }
    return sum(baseline) / len(tasks), lost


def _read_table(path: Path, num_layers: int) -> tuple[list[str], dict[int, list[float]]]:
    """Names of the tasks, and a score per task by layer."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except OSError as error:
        raise ValueError(f"{path}: it cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is not UTF-8 text ({error.reason}); save the scores as CSV in UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num}: it is not CSV ({error}); mend the line") from None
    lines = [(number, row) for number, row in lines if any(row)]
    if not lines:
        raise ValueError(f"{path}: it is empty; write a line 'layer,<task>,...', then a line for each layer")
    (number, header), *body = lines
    if header[0] != "layer" or len(header) < 2 or "" in header or len(set(header)) < len(header):
        raise ValueError(
            f"{path} line {number}: {','.join(header)!r} is no header; name the columns layer, then each task once"
        )
    rows: dict[int, list[float]] = {}
    for number, row in body:
        place = f"{path} line {number}"
        if len(row) != len(header):
            raise ValueError(f"{place}: {len(row)} cells for the {len(header)} columns {', '.join(header)}; give each")
        layer = _layer(place, row[0], num_layers)
        if layer in rows:
            raise ValueError(f"{place}: layer {layer} has a row already; give each layer one")
        rows[layer] = [_score(place, *pair) for pair in zip(header[1:], row[1:], strict=True)]
    return header[1:], rows


def _layer(place: str, cell: str, num_layers: int) -> int:
    try:
        layer = int(cell)
    except ValueError:
        raise ValueError(
            f"{place} column layer: {cell!r} is no layer number; write 0, 1, ..., or {BASELINE_ROW} for the whole model"
        ) from None
    if not BASELINE_ROW <= layer < num_layers:
        raise ValueError(
            f"{place} column layer: the model has no layer {layer}; it has {num_layers}, use 0..{num_layers - 1}, or "
            f"{BASELINE_ROW} for the whole model"
        )
    return layer


def _score(place: str, task: str, cell: str) -> float:
    try:
        score = float(cell)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{place} column {task}: {cell!r} is no finite number; write the task's score, e.g. 0.71")
    return score
