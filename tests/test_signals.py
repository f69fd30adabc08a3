"""Asked to stop, a run ends at a step; asked twice, at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from ntjax.signals import StopRequest

BOTH = [(signal.SIGTERM, 75), (signal.SIGINT, 130)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested is number
    assert capfd.readouterr().err == f"ntjax: {number.name}: stopping after this step, again to stop now\n"


def test_the_handlers_of_before_come_back() -> None:
    before = [signal.getsignal(number) for number, _ in BOTH]
    with StopRequest():
        assert [signal.getsignal(number) for number, _ in BOTH] != before
    assert [signal.getsignal(number) for number, _ in BOTH] == before


@pytest.mark.parametrize(("number", "code"), BOTH)
def test_the_second_signal_ends_the_process_at_once(number: signal.Signals, code: int) -> None:
    script = f"""
        import os, time
        from ntjax.signals import StopRequest
        with StopRequest():
            try:
                os.kill(os.getpid(), {int(number)})
                os.kill(os.getpid(), {int(number)})
            finally:
                print("not reached")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")


def test_in_another_thread_it_never_asks() -> None:
    asked = []

    def work() -> None:
        with StopRequest() as stop:
            asked.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [None]
