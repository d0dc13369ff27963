"""What our messages quote of an exception that another library raised."""


def sentence(error: BaseException) -> str:
    """The first line of an exception's text, or the name of its class if it has no text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
