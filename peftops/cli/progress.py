"""How far a command is.

A terminal shows bars. A log gets a plain line every few steps, so that it shows life.
"""

import time

LINES = 8  # of a stage at most, where there is no terminal
MEMORY = 300  # seconds; rich forgets the speed of steps that are older


class Progress:
    """Shows stages on a console.

    with Progress(console) as progress:
        stage = progress.stage("train", 40)
        stage.advance("loss 2.3")
    """

    def __init__(self, console):
        from rich import progress

        self.console = console
        columns = (
            progress.TextColumn("{task.description:14}"),
            progress.BarColumn(24),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            progress.TextColumn("{task.fields[note]}"),
        )
        self.bars = progress.Progress(
            *columns,
            console=console,
            speed_estimate_period=MEMORY,
        )

    def __enter__(self):
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *_):
        if self.console.is_terminal:
            self.bars.stop()

    def stage(self, description, total):
        """A stage of `total` steps. Call its advance(note) after each step."""
        if self.console.is_terminal:
            return Bar(self.bars, description, total)
        return Lines(self.console, description, total)

    def track(self, description, items):
        """The items. Each counts as done when the next is asked for."""
        stage = self.stage(description, len(items))
        for item in items:
            yield item
            stage.advance()


class Bar:
    """A stage in a terminal."""

    def __init__(self, bars, description, total):
        self.bars = bars
        self.task = bars.add_task(description, total=total, note="")

    def advance(self, note=""):
        self.bars.update(self.task, advance=1, note=note)


class Lines:
    """A stage in a log."""

    def __init__(self, console, description, total):
        self.console = console
        self.description = description
        self.total = total
        self.done = 0
        self.start = time.monotonic()

    def advance(self, note=""):
        self.done += 1
        interval = -(-self.total // LINES)
        if self.done % interval and self.done < self.total:
            return
        took = time.monotonic() - self.start
        left = took / self.done * (self.total - self.done)
        phrases = [f"{self.description}: {self.done} of {self.total}"]
        if note:
            phrases.append(note)
        if self.done < self.total:
            phrases.append(f"{clock(left)} left")
        else:
            phrases.append(f"took {clock(took)}")
        self.console.print(
            ", ".join(phrases),
            highlight=False,
            soft_wrap=True,
        )


def clock(seconds):
    """1:05 of 65 seconds."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"
