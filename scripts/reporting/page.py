"""The page: `page.html.j2` filled with what the other modules have read."""

import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.files import write_bytes
from common.settings import VERSION
from reporting.charts import Curve, line_chart, smoothed
from reporting.dataset import Dataset
from reporting.run import Run

TAGS_SHOWN = 40


def write_page(page: Path, trigger: str, dataset: Dataset, run: Run | None) -> None:
    """Write the whole page to `page`, atomically, unless it is there already. Every text of the user is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html.j2").render(
        version=VERSION,
        trigger=trigger,
        dataset=dataset,
        run=run,
        tags=dataset.tags[:TAGS_SHOWN],
        charts=_charts(run) if run else [],
        command=_command(run) if run else "",
    )
    content = html.encode("utf-8", "replace")
    if not page.is_file() or page.read_bytes() != content:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(page, content)


def _charts(run: Run) -> list[str]:
    loss, validation = run.series("loss"), run.series("validation_loss")
    curves = [Curve("training loss", loss, "raw"), Curve("smoothed", smoothed(loss), "smooth")]
    if validation:
        curves.append(Curve("validation loss", validation, "second"))
    return [
        line_chart("Loss by step", curves),
        line_chart("Learning rate by step", [Curve("learning rate", run.series("lr"), "smooth")]),
    ]


def _command(run: Run) -> str:
    """The command that trains with these settings again: those that are not the defaults, as environment variables."""
    changed = [f"{setting.key.rpartition('.')[2].upper()}={_quoted(setting.value)}" for setting in run.settings if setting.origin]
    return " ".join([*changed, "docker compose run --rm loracat --train"])


def _quoted(text: str) -> str:
    """`text` as one word of a shell command."""
    return shlex.quote(text.strip('"'))
