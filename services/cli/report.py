"""`isentrope report`: one HTML file of a run, finished or not, and its figures as PNGs.

The figures are inside the file too, so that it can be sent to somebody by itself.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from services.cli.chapters import CHAPTERS, Chapter, Subject
from services.cli.checkpoints import checkpoints_text
from services.cli.figures import Absent
from services.cli.measurements import Row, latest, read_rows, values
from services.cli.run_folder import RunFolder
from services.cli.summary import Facts, entropy_text, evaluation_text, law_facts
from shared.errors import StartError

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 820px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h3 { font-size: 1.1rem; margin: 1.8rem 0 .3rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 0; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td { padding: .15rem 1.2rem .15rem 0; vertical-align: top; }
td:first-child { color: #666; white-space: nowrap; }
img { width: 100%; height: auto; } p.absent { color: #666; margin: .6rem 0; }
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A figure of the report; `image` is a PNG, None where there was nothing to draw."""

    subject: Subject
    text: str
    image: bytes | None


def make_report(folder: RunFolder) -> Path:
    """Write `report.html` and `plots/`; the path of the report.

    Raises:
        StartError: they cannot be written.
    """
    rows = read_rows(folder.metrics)
    chapters = [
        (chapter, [_section(subject, rows) for subject in chapter.subjects]) for chapter in CHAPTERS
    ]
    try:
        folder.plots.mkdir(exist_ok=True)
        for section in (section for _, sections in chapters for section in sections):
            _write_plot(folder.plots / f"{section.subject.name}.png", section.image)
        _write_whole(folder.report, _page(folder.run_id, _facts(folder, rows), chapters).encode())
    except OSError as error:
        raise StartError(
            f"{folder.report}: cannot be written ({error}); make room or make the folder writable"
        ) from None
    return folder.report


def _section(subject: Subject, rows: Sequence[Row]) -> Section:
    try:
        drawing = subject.draw(rows)
    except Absent as reason:
        return Section(subject, f"Left out: {reason}.", None)
    image = BytesIO()
    drawing.figure.savefig(image, format="png")
    return Section(subject, drawing.reading, image.getvalue())


def _facts(folder: RunFolder, rows: Sequence[Row]) -> Facts:
    """The few numbers at the top."""
    if not rows:
        return [("steps", "none: metrics.jsonl is missing or empty")]
    tokens = sum(values(rows, "tokens"))
    facts = [
        ("steps", f"{latest(rows, 'step') or 0:.0f}"),
        ("evaluation score", evaluation_text(rows)),
        ("entropy", entropy_text(rows)),
        *law_facts(rows),
        ("tokens trained on", f"{tokens:,.0f}" if tokens else "not measured"),
        ("checkpoints", checkpoints_text(folder, rows)),
    ]
    return [(name, text) for name, text in facts if text]


def _page(title: str, facts: Facts, chapters: Sequence[tuple[Chapter, Sequence[Section]]]) -> str:
    table = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in facts
    )
    body = "".join(_chapter_html(chapter, sections) for chapter, sections in chapters)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>Run {html.escape(title)}</h1>\n<table>{table}</table>\n{body}</body></html>\n"
    )


def _chapter_html(chapter: Chapter, sections: Sequence[Section]) -> str:
    """The figures that were drawn, then a line for each that was not."""
    drawn = [section for section in sections if section.image is not None]
    absent = [section for section in sections if section.image is None]
    parts = "".join(map(_section_html, [*drawn, *absent]))
    return f"<h2>{html.escape(chapter.title)}</h2>\n{parts}"


def _section_html(section: Section) -> str:
    title, text = html.escape(section.subject.title), html.escape(section.text)
    if section.image is None:
        return f'<p class="absent"><b>{title}</b> {text}</p>\n'
    source = "data:image/png;base64," + base64.b64encode(section.image).decode()
    return f'<h3>{title}</h3><p>{text}</p>\n<img alt="{title}: {text}" src="{source}">\n'


def _write_plot(path: Path, image: bytes | None) -> None:
    """The figure as a file; none, not an old one, where it was left out."""
    if image is None:
        path.unlink(missing_ok=True)
    else:
        _write_whole(path, image)


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
