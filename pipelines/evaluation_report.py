"""What an evaluation leaves to look at: a table, curves over steps and guidance, the best and worst pictures, pages."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from paella.images import contact_sheet
from paella.storage import new_file

matplotlib.use("Agg")

Rows = dict[str, dict[str, list[float]]]
"""Metrics by label: value, and half the width of its 95 % confidence interval or None."""
SMALLER_IS_BETTER = ("fid", "clip_fid", "cmmd")
COMPARED_IMAGES = 200
"""Prompts on a page that compares."""


def write(output: Path, report: dict[str, Any]) -> None:
    """report.md, curves.png where there are several cells, best.png and worst.png where pictures have scores, index.html."""
    cells = report["cells"]
    _text(
        output / "report.md", table({name: cell["metrics"] for name, cell in cells.items()}) + categories(cells) + extra(report)
    )
    if len(cells) > 1:
        curves(cells, output / "curves.png")
    best = best_cell(cells)
    for name, pictures in extremes(cells[best]["images"]).items():
        images = [np.asarray(Image.open(output / picture["file"]).convert("RGB")) for picture in pictures]
        with new_file(output / f"{name}.png") as file:
            contact_sheet(images, [picture["prompt"] for picture in pictures]).save(file, format="PNG")
    _text(output / "index.html", page(output, report, best))


def table(rows: Rows) -> str:
    """A Markdown table: a row for each name, a column for each metric, with intervals; the best of each column is bold."""
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    lines = [f"| | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}"]
    for label, metrics in rows.items():
        cells = [_cell(metrics.get(name), name, rows) for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: list[float] | None, name: str, rows: Rows) -> str:
    if value is None:
        return "–"
    text = f"{value[0]:.4g}" + (f" ± {value[1]:.2g}" if value[1] is not None else "")
    values = [metrics[name][0] for metrics in rows.values() if name in metrics]
    is_best = len(values) > 1 and value[0] == (min if name in SMALLER_IS_BETTER else max)(values)
    return f"**{text}**" if is_best else text


def categories(cells: dict[str, Any]) -> str:
    """Tables of the categories of each cell, if there are any."""
    return "".join(f"\n{name}, by category:\n\n{table(cell['categories'])}" for name, cell in cells.items() if cell["categories"])


def extra(report: dict[str, Any]) -> str:
    """What the VQGAN alone loses, as a line."""
    values = report.get("reconstruction")
    if not values:
        return ""
    text = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))
    return f"\nReconstruction by the VQGAN alone: {text}\n"


def _leading(metrics: dict[str, list[float]]) -> str:
    return next(name for name in ("fid", "cmmd", "clip_fid", "scene_all", "clip_score", *metrics) if name in metrics)


def best_cell(cells: dict[str, Any]) -> str:
    """The cell that is best by FID, else by CMMD, and so on."""
    leading = _leading(next(iter(cells.values()))["metrics"])
    sign = 1 if leading in SMALLER_IS_BETTER else -1
    return min(cells, key=lambda name: sign * cells[name]["metrics"][leading][0])


def extremes(images: Sequence[dict[str, Any]], num: int = 16) -> dict[str, list[dict[str, Any]]]:
    """The pictures with the best and the worst CLIP score; nothing without scores."""
    scored = sorted((image for image in images if "clip_score" in image), key=lambda image: -image["clip_score"])
    return {"best": scored[:num], "worst": scored[::-1][:num]} if scored else {}


def curves(cells: dict[str, Any], file: Path) -> None:
    """Each metric over the steps, a line for each guidance weight, with intervals."""
    from matplotlib import pyplot

    names = list(next(iter(cells.values()))["metrics"])
    columns = min(4, len(names))
    shape = -(-len(names) // columns), columns
    figure, axes = pyplot.subplots(*shape, figsize=(3.6 * columns, 3 * shape[0]), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        lines: dict[str, list[tuple[int, float, float]]] = {}
        for cell, content in cells.items():
            steps, cfg = cell.removeprefix("steps").split("-", 1)
            lines.setdefault(cfg.replace("cfg", "cfg "), []).append((int(steps), *content["metrics"][name]))
        for label, points in lines.items():
            x, y, half = zip(*sorted(points), strict=True)
            axis.errorbar(x, y, yerr=half, label=label, capsize=2, marker="o", markersize=3)
        axis.set(title=name, xlabel="steps")
    axes.flat[0].legend()
    figure.tight_layout()
    with new_file(file) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    pyplot.close(figure)


def page(output: Path, report: dict[str, Any], best: str) -> str:
    """The page of one evaluation."""
    about = f"{report['model']} · {report['prompts']} prompts · reference {report['reference']}"
    parts = [f"<p>{html.escape(about)}</p>"]
    parts.append(html_table({name: cell["metrics"] for name, cell in report["cells"].items()}))
    if (output / "curves.png").exists():
        parts.append('<h2>Steps and guidance</h2><img src="curves.png" alt="metrics over steps and guidance">')
    for name in ("best", "worst"):
        if (output / f"{name}.png").exists():
            parts.append(
                f'<h2>{name.capitalize()} by CLIP score, of {html.escape(best)}</h2><img src="{name}.png" alt="{name} pictures">'
            )
    links = "".join(f'<li><a href="pictures/index.html#{name}">{html.escape(name)}</a></li>' for name in report["cells"])
    return PAGE.format(title="evaluation", body="".join([*parts, f"<h2>All pictures</h2><ul>{links}</ul>"]))


def html_table(rows: Rows) -> str:
    """`table` for a page."""
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["", *names])
    body = ""
    for label, metrics in rows.items():
        cells = [_cell(metrics.get(name), name, rows) for name in names]
        shown = [f"<b>{cell.strip('*')}</b>" if cell.startswith("**") else cell for cell in cells]
        body += f"<tr><th>{html.escape(label)}</th>{''.join(f'<td>{cell}</td>' for cell in shown)}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def compare(runs: Sequence[str], output: Path) -> Path:
    """Print a table of finished evaluations and write it with a page of their pictures side by side.

    Raises ValueError for a directory without a finished evaluation.
    """
    reports = {}
    for run in runs:
        file = Path(run) / "report.json"
        if not file.is_file():
            raise ValueError(f"{run} is not a finished evaluation: it has no report.json")
        reports[run] = json.loads(file.read_text())
    rows = {
        run if len(report["cells"]) == 1 else f"{run} {name}": cell["metrics"]
        for run, report in reports.items()
        for name, cell in report["cells"].items()
    }
    _text(output / "report.md", table(rows))
    columns = {run: report["cells"][best_cell(report["cells"])]["images"] for run, report in reports.items()}
    body = html_table(rows) + _side_by_side(columns, output)
    _text(output / "index.html", PAGE.format(title="evaluations side by side", body=body))
    print(table(rows))
    print(f"look: {output / 'index.html'}")
    return output


def _side_by_side(columns: dict[str, list[dict[str, Any]]], output: Path) -> str:
    """Pictures of the prompts that all have, a row for each."""
    by_prompt = {run: {image["prompt"]: image for image in reversed(images)} for run, images in columns.items()}
    common = [image["prompt"] for image in next(iter(columns.values()))]
    common = [prompt for prompt in dict.fromkeys(common) if all(prompt in images for images in by_prompt.values())]
    rows = "<tr><th></th>" + "".join(f"<th>{html.escape(run)}</th>" for run in columns) + "</tr>"
    for prompt in common[:COMPARED_IMAGES]:
        cells = ""
        for run, images in by_prompt.items():
            source = os.path.relpath(Path(run) / images[prompt]["file"], output)
            score = f"<br>{images[prompt]['clip_score']:.1f}" if "clip_score" in images[prompt] else ""
            cells += f'<td><img loading="lazy" src="{html.escape(source, quote=True)}" alt="">{score}</td>'
        rows += f"<tr><th>{html.escape(prompt)}</th>{cells}</tr>"
    return f"<h2>{min(len(common), COMPARED_IMAGES)} of {len(common)} prompts that all have</h2><table>{rows}</table>"


def _text(path: Path, text: str) -> None:
    with new_file(path) as file:
        file.write_text(text)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>paella-ray: {title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em; }}
img {{ max-width: 100%; background: white; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th {{ text-align: left; font-weight: 500; max-width: 24em; }}
th, td {{ padding: .2em 1em .2em 0; vertical-align: top; }}
</style></head><body>
<h1>paella-ray: {title}</h1>
{body}
</body></html>
"""
