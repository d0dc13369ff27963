"""Runs a command of peftops in this process."""

from peftops.__main__ import main


def run(capsys, *argv):
    """(exit code, stdout, stderr) of `peftops ARGV`."""
    code = main(list(argv))
    return code, *capsys.readouterr()


def refusal(capsys, *argv):
    """The one sentence on stderr of a command that must exit with 2."""
    code, _, error = run(capsys, *argv)
    assert code == 2
    assert error.count("\n") == 1
    return error
