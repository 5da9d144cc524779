"""`make gpu-check` on a machine without a GPU: what can be shown of it there."""

import sys
import time
from pathlib import Path

import pytest

import gpu_check


@pytest.fixture(autouse=True)
def begun_now(monkeypatch):
    """The whole check has its time from the import on, which was long ago."""
    monkeypatch.setattr(gpu_check, "BEGIN", time.monotonic())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_step_that_takes_too_long_ends_with_all_that_it_started(tmp_path):
    """A compiler left behind would slow the measurements after it."""
    note = tmp_path / "pid"
    program = (
        "import pathlib, subprocess, sys; child = subprocess.Popen(['sleep', '60']); "
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid)); child.wait()"
    )
    row = gpu_check.step("endless", [sys.executable, "-c", program, note], 4.0)
    assert not row.passed
    assert row.measured.startswith("not done after")
    stat = Path(f"/proc/{note.read_text()}/stat")
    for _ in range(100):  # a killed process stays as a zombie until somebody asks for it
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the step's child is still running")


def test_a_step_tells_how_it_ended():
    assert gpu_check.step("good", [sys.executable, "-c", ""], 60.0).passed
    row = gpu_check.step("bad", [sys.executable, "-c", "import os; os._exit(int(os.environ['WITH']))"], 60.0, WITH="7")
    assert not row.passed
    assert row.measured.startswith("ended with 7")
