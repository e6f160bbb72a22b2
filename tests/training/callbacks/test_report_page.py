"""The report page while training runs: real processes of scripts/report.py."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from common.errors import MEMORY_SIGNAL, Stopped, stop_on_signals
from common.project import ProjectSettings, SharedDataSettings
from training.callbacks.report_page import NICENESS, ReportPage, report_page, write_report_page
from training.data.buckets import Bucket, OptimizerStep
from training.loop import Progress

STEP = OptimizerStep(number=0, epoch=0, bucket=Bucket(64, 64), examples=())


@pytest.fixture
def project(tmp_path) -> ProjectSettings:
    return ProjectSettings(trigger_word="sks=1", dataset_dir=tmp_path / "dataset", output_dir=tmp_path / "output")


def save(page: ReportPage) -> None:
    """What the loop calls after a save: the end of the epoch, then the next step."""
    page.after_epoch(STEP, 1, Progress())
    page.after_step(STEP, {})


def wait_for_the_process(page: ReportPage) -> None:
    page.process.wait(30)
    page.after_step(STEP, {})


def test_the_page_is_written_after_a_save_with_the_lowest_priority(project):
    with report_page(project, SharedDataSettings(), lambda before, after: True) as page:
        page.after_step(STEP, {})
        assert page.process is None
        save(page)
        assert os.getpriority(os.PRIO_PROCESS, page.process.pid) == NICENESS
    assert "sks=1 - LoRACat report" in (project.output_dir / "report.html").read_text(encoding="utf-8")


def test_at_the_end_it_is_written_and_waited_for(project, capsys):
    write_report_page(project, SharedDataSettings())
    page = project.output_dir / "report.html"
    assert "sks=1 - LoRACat report" in page.read_text(encoding="utf-8")
    assert capsys.readouterr().out == ""
    page.unlink()
    page.mkdir()
    write_report_page(project, SharedDataSettings())
    assert capsys.readouterr().out.startswith("warning: the report page was not written: report: ")


def test_a_signal_ends_the_page_at_the_end_of_a_run(project, monkeypatch, tmp_path):
    """Whatever its process says meanwhile."""
    program = tmp_path / "slow.py"
    program.write_text("import sys, time\nsys.stderr.write('x' * 200_000)\nsys.stderr.flush()\ntime.sleep(60)")
    monkeypatch.setattr("training.callbacks.report_page.REPORT", program)
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, MEMORY_SIGNAL)}
    begin = time.monotonic()
    try:
        stop_on_signals()
        timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        with pytest.raises(Stopped):
            write_report_page(project, SharedDataSettings())
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert time.monotonic() - begin < 30


def test_the_page_reads_captions_and_transparency_as_the_run_does(project):
    (project.dataset_dir / "images").mkdir(parents=True)
    Image.new("RGBA", (64, 64), (200, 0, 0, 128)).save(project.dataset_dir / "images" / "a.png")
    (project.dataset_dir / "images" / "a.txt").write_text("sks, smile\nsks, hat")
    with report_page(project, SharedDataSettings(caption_per_line=True, alpha="mask"), lambda before, after: True) as page:
        save(page)
    text = (project.output_dir / "report.html").read_text(encoding="utf-8")
    assert "sks, smile\nsks, hat" in text
    assert "1 with a mask" in text


def test_there_is_one_process_at_a_time_and_a_save_meanwhile_is_not_forgotten(project):
    with report_page(project, SharedDataSettings(), lambda before, after: True) as page:
        save(page)
        first = page.process
        save(page)
        assert page.process is first
        wait_for_the_process(page)
        assert page.process is not first


def test_epochs_without_a_save_start_nothing(project):
    with report_page(project, SharedDataSettings(), lambda before, after: False) as page:
        save(page)
        assert page.process is None


def test_a_failure_is_one_warning(project, capsys):
    (project.output_dir / "report.html").mkdir(parents=True)
    with report_page(project, SharedDataSettings(), lambda before, after: True) as page:
        for _ in range(2):
            save(page)
            wait_for_the_process(page)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: the report page was not written: report: ")
    assert "report.html" in line


def test_a_program_that_cannot_be_started_is_one_warning(project, capsys, monkeypatch):
    monkeypatch.setattr("sys.executable", str(project.output_dir / "python"))
    with report_page(project, SharedDataSettings(), lambda before, after: True) as page:
        save(page)
        save(page)
    assert capsys.readouterr().out == "warning: the report page was not written: No such file or directory\n"


@pytest.mark.parametrize("late_s", [0.0, 0.3])
def test_a_stop_does_not_wait_and_leaves_nothing_behind(project, late_s):
    def files() -> set[Path]:
        return {path for path in project.output_dir.rglob("*") if path.is_file()}

    processes = []

    def run() -> None:
        with report_page(project, SharedDataSettings(), lambda before, after: True) as page:
            save(page)
            processes.append(page.process)
            time.sleep(late_s)
            raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert time.monotonic() - begun < late_s + 2.5
    assert processes[0].returncode is not None  # it may have ended before the stop
    assert files() <= {project.output_dir / "report.html"}
