"""`python -m ntjax.launch --processes N -- COMMAND`: N processes of a command on this machine, as one run.

They end together: when one fails the others are killed. A run that was preempted or lost a process (75, 76, a kill) is
started again, with NTJAX_RESUME=auto, so that `ntjax.train` goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

from ntjax import errors

AGAIN = {75, 76, 134, 137}  # preempted, peer lost, aborted by jax.distributed, killed
GRACE = 2.0  # seconds in which those that noticed may say why they end
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(argv: Sequence[str]) -> None:
    """Parses the command line and runs the command."""
    parser = argparse.ArgumentParser(
        "ntjax launch", description="Runs a command in several processes of this machine that form one run."
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="how many")
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="K", help="start again so often at most"
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what each runs, after --")
    args = parser.parse_args(argv)
    if args.processes < 1:
        raise errors.ConfigError(
            f"--processes {args.processes}: at least one is needed", where="the command line"
        )
    sys.exit(supervise(args.command, args.processes, args.max_restarts))


def supervise(command: Sequence[str], processes: int, restarts: int) -> int:
    """Runs the command until it is done, fails for good, or has been started again `restarts` times; its code."""
    began = time.time()
    for attempt in range(restarts + 1):
        crew = Crew.start(command, processes, goes_on=attempt > 0, since=began)
        code = crew.wait()
        if code == 0:
            return 0
        again = code in AGAIN and attempt < restarts and crew.asked is None
        how = f"starting again, {attempt + 1} of {restarts}" if again else "not started again"
        print(f"ntjax launch: {crew.cause()}; {how}", file=sys.stderr, flush=True)
        if not again:
            break
    return code


@dataclass
class Crew:
    """The processes of one attempt."""

    members: list[subprocess.Popen[bytes]]
    relays: list[threading.Thread]
    asked: signal.Signals | None = None
    ended: dict[int, int] = field(default_factory=dict)  # number -> exit code, in the order of their ends

    @classmethod
    def start(cls, command: Sequence[str], processes: int, *, goes_on: bool, since: float) -> Crew:
        """Starts the processes; what they print is passed on, with the number of all but the first before it. If it
        `goes_on`, with what was begun `since`."""
        place = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "NTJAX_NUM_PROCESSES": str(processes)}
        if goes_on:
            place |= {"NTJAX_RESUME": "auto", "NTJAX_SINCE": str(since)}
        crew = cls([], [])
        for number in range(processes):
            env = {**os.environ, **place, "NTJAX_PROCESS_ID": str(number)}
            try:
                # A session of their own: Ctrl-C reaches them once, by way of this process.
                member = subprocess.Popen(
                    command,
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
            except OSError as error:
                raise errors.ConfigError(
                    f"{command[0]} can't be run: {error.strerror}",
                    where="COMMAND",
                    fix="write it as in a shell: python -m ntjax.train --config FILE",
                ) from error
            crew.members.append(member)
            for stream, out in ((member.stdout, sys.stdout), (member.stderr, sys.stderr)):
                assert stream is not None
                relay = threading.Thread(target=_pass_on, args=(stream, out, number), daemon=True)
                relay.start()
                crew.relays.append(relay)
        return crew

    def wait(self) -> int:
        """Waits for all; the first that fails ends the others. The code that says most of the failure, or 0."""
        before = {number: signal.signal(number, self._forward) for number in SIGNALS}
        try:
            while len(self.ended) < len(self.members) and not any(self.ended.values()):
                self._look()
            if any(self.ended.values()):
                self._end_all()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        for relay in self.relays:
            relay.join(GRACE)
        failed = [code for code in self.ended.values() if code]
        final = [code for code in failed if code not in AGAIN]
        return (final or failed or [0])[0]

    def cause(self) -> str:
        """Who ended first."""
        number, code = next((number, code) for number, code in self.ended.items() if code)
        return f"process {number} of {len(self.members)} was the first to end, with {code}"

    def _look(self) -> None:
        """Notes who has ended."""
        time.sleep(0.05)
        for number, member in enumerate(self.members):
            if number not in self.ended and (code := member.poll()) is not None:
                self.ended[number] = 128 - code if code < 0 else code

    def _end_all(self) -> None:
        """Gives the others a moment to end by themselves, then kills them; what is killed here is no cause."""
        deadline = time.monotonic() + GRACE
        while len(self.ended) < len(self.members) and time.monotonic() < deadline:
            self._look()
        for number, member in enumerate(self.members):
            if number not in self.ended:
                member.kill()
                member.wait()
                self.ended[number] = 137

    def _forward(self, number: int, frame: object) -> None:
        """A signal to stop is for all of them, and none is started again."""
        self.asked = signal.Signals(number)
        for member in self.members:
            if member.poll() is None:
                member.send_signal(number)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _pass_on(stream: IO[bytes], out: IO[str], number: int) -> None:
    """Prints what a process prints, line by line."""
    for line in stream:
        text = line.decode(errors="replace")
        mark = f"[process {number}] "
        out.write(text if number == 0 or text.startswith(mark) else mark + text)
        out.flush()


if __name__ == "__main__":
    errors.run(main)
