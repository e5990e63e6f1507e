"""Progress goes to the log where somebody listens, else to a bar on a terminal, else nowhere."""

from __future__ import annotations

import io
import logging

import pytest

from fxopt import progress as module
from fxopt.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def fail() -> None:
    with progress("dividing", 2) as advance:
        advance(1)
        advance(1 / 0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.0)


def work(total: int = 3) -> None:
    with progress("counting", total) as advance:
        for _ in range(3):
            advance(1)


@pytest.mark.usefixtures("impatient")
def test_who_listens_to_the_log_reads_it_there(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with caplog.at_level(logging.INFO, "fxopt"):
        work()
        work(total=0)
    assert caplog.messages == [
        "counting: 1 of 3 batches",
        "counting: 2 of 3 batches",
        "counting: 3 of 3 batches",
        "counting: 1 batches",
        "counting: 2 batches",
        "counting: 3 batches",
    ]
    assert terminal.getvalue() == ""


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("total", [3, 0])
def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    work(total)
    assert "counting" in terminal.getvalue()
    assert "3 batches" in terminal.getvalue()


@pytest.mark.usefixtures("impatient")
def test_a_file_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    work()
    assert file.getvalue() == ""


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    work()
    with caplog.at_level(logging.INFO, "fxopt"):
        work()
    assert terminal.getvalue() == ""
    assert caplog.messages == []


@pytest.mark.usefixtures("impatient")
def test_the_bar_goes_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(ZeroDivisionError):
        fail()
    assert terminal.getvalue().endswith("\x1b[2K")  # the line is erased
