"""What our messages say of other libraries: that one is missing, or what one raised."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def sentence(error: BaseException) -> str:
    """The first line of an exception's text, or the name of its class if it has no text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def not_installed(packages: Sequence[str], extra: str | None = None) -> str:
    """A sentence that names missing packages and the pip command for them.

    Args:
        extra: the extra of peftops that installs the packages, if there is one.
    """
    *others, last = packages
    subject = f"{', '.join(others)} and {last} are" if others else f"{last} is"
    wanted = f"'peftops[{extra}]'" if extra else " ".join(packages)
    return f"{subject} not installed: pip install {wanted}"


@contextmanager
def naming_extra(extra: str, *packages: str) -> Iterator[None]:
    """Inside the block, an import of a package that is missing names the extra to install.

    An import that fails inside of an installed package is raised as it is.

    Raises:
        ModuleNotFoundError: one of the packages is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in packages:
            raise
        text = not_installed([error.name], extra)
        raise ModuleNotFoundError(text, name=error.name) from None
