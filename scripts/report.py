"""Write OUTPUT_DIR/report.html: one page that shows the data set, the training run and what it learned."""

import signal

if __name__ == "__main__":  # Ctrl-C while libraries are imported ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from dataclasses import dataclass

from common.dataset_layout import DatasetFolder
from common.errors import run_main, stop_on_signals
from common.output_layout import OutputLayout
from common.project import ProjectSettings, SharedTrainSettings
from common.settings import IN_CONTAINER, REPOSITORY, read_request
from reporting.dataset import read_dataset
from reporting.page import write_page
from reporting.run import read_run

STAGE = "report"


@dataclass(frozen=True)
class Tables:
    """What this stage reads of the settings."""

    project: ProjectSettings
    train: SharedTrainSettings


def main(argv: list[str]) -> None:
    stop_on_signals()
    request = read_request(STAGE, __doc__, argv, Tables)
    project = request.settings.project
    page = OutputLayout(project.output_dir, "").report
    dataset = read_dataset(DatasetFolder(project.dataset_dir), project.trigger_word, request.settings.train.data)
    run = read_run(project.output_dir, project.trigger_word)
    if request.check:
        print(f"report: {len(dataset.images)} images, {'a training run' if run else 'no training run yet'}; written to {page}")
        return
    write_page(page, project.trigger_word, dataset, run)
    print(f"report: {page.relative_to(REPOSITORY) if IN_CONTAINER and page.is_relative_to(REPOSITORY) else page}")


if __name__ == "__main__":
    sys.exit(run_main(STAGE, lambda: main(sys.argv[1:])))
