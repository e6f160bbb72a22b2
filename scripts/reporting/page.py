"""The page: `page.html.j2` filled with what the other modules have read."""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.files import write_bytes
from common.settings import VERSION, pipeline_command
from reporting.charts import Curve, Level, line_chart, smoothed
from reporting.dataset import Dataset
from reporting.recipe import repeat_command
from reporting.run import Run

TAGS_SHOWN = 40
_TEMPLATES = Path(__file__).parent
_SCRIPT = "page.js"


def write_page(page: Path, trigger: str, dataset: Dataset, run: Run | None) -> None:
    """Write the whole page to `page`, atomically, unless it is there already. Every text of the user is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_TEMPLATES / _SCRIPT).read_text(encoding="utf-8")
    html = environment.get_template("page.html.j2").render(
        version=VERSION,
        trigger=trigger,
        dataset=dataset,
        run=run,
        tags=dataset.tags[:TAGS_SHOWN],
        charts=_charts(run) if run else [],
        command=repeat_command(run.settings) if run else "",
        run_stage=pipeline_command,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),  # no other script runs on the page
        unreadable=[*dataset.unreadable, *(run.unreadable if run else ())],
    )
    content = html.encode("utf-8", "replace")
    if not page.is_file() or page.read_bytes() != content:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(page, content)


def _charts(run: Run) -> list[str]:
    loss, validation, samples = run.series("loss"), run.series("validation_loss"), run.samples
    curves = [Curve("training loss", loss, "raw"), Curve("smoothed", smoothed(loss), "smooth")]
    if validation:
        curves.append(Curve("validation loss", validation, "raw second dots"))
        curves.append(Curve("smoothed validation loss", run.series("validation_loss_smoothed"), "second"))
    charts = [line_chart("Loss by step", curves)]
    rows = [row for row in samples.rows if row.likeness is not None]
    if rows:
        ends = (("ceiling", samples.ceiling), ("floor", samples.floor))
        levels = [Level(f"{name} {value:.2f}", value) for name, value in ends if value is not None]
        points = [(row.step, row.likeness) for row in rows]
        marked = [(row.step, row.likeness) for row in rows if row.is_recommended]
        charts.append(line_chart("Likeness by step", [Curve("likeness", points, "smooth dots")], levels, marked))
    rates = [Curve("UNet", run.series("lr"), "smooth"), Curve("text encoders", run.series("text_encoder_lr"), "second")]
    charts.append(line_chart("Learning rate by step", rates))
    return charts if run.metrics or rows else []
