"""A progress bar on standard error if that is a terminal. Otherwise it shows nothing."""

import sys


class Progress:
    """with Progress() as progress: for item in progress.track(items, total, "what"): …"""

    bar = None

    def __enter__(self):
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import Progress as Bar
            except ModuleNotFoundError:
                return self
            self.bar = Bar(console=Console(stderr=True), transient=True)
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()

    def track(self, items, total, what):
        """The items, with a bar that advances at each of them."""
        if not self.bar:
            return items
        return self.bar.track(items, total=total, description=what)
