"""PEFT's own tests on peftops: a pytest plugin, and a command that runs them without and with.

    python -m peftops.bench.proof.peft_suite PEFT_CHECKOUT [-k "Vanilla and LoRA"]

The tests are of the checkout, PEFT is the one that is installed. Exit code 0 says that every test
has the same outcome both times.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch
from peft.tuners.lora import layer, model

from peftops.integrations.peft import layer as ours

DISPATCH, PLAN = model.dispatch_default, ours.plan_call
OUTCOMES = "passed", "failure", "error", "skipped"
calls = Counter()  # as Report counts them


class Linear(ours.FusedLinear):
    """Has the name of PEFT's layer, since tests look at its repr."""


def dispatch(*args, **kwargs):
    made = DISPATCH(*args, **kwargs)
    if type(made) is layer.Linear:
        # DoRA's gains are kept from its first forward, like those of a later adapter.
        made.__class__ = Linear
    return made


def plan_call(made, *args):
    call = PLAN(made, *args)
    if not torch.compiler.is_compiling():
        calls[ours.key_of(call)] += 1
    return call


def pytest_configure():
    model.dispatch_default, ours.plan_call = dispatch, plan_call


def pytest_unconfigure():
    model.dispatch_default, ours.plan_call = DISPATCH, PLAN


def pytest_terminal_summary(terminalreporter):
    counts = ", ".join(f"{count} {key}" for key, count in calls.most_common())
    terminalreporter.write_line(f"peftops: calls of LoRA layers: {counts or 'none'}")


def options(argv):
    parser = argparse.ArgumentParser(
        prog="python -m peftops.bench.proof.peft_suite",
        description=__doc__,
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "checkout",
        metavar="PEFT_CHECKOUT",
        type=Path,
        help="PEFT's sources, with tests/",
    )
    parser.add_argument(
        "tests",
        nargs="*",
        default=["tests/test_custom_models.py"],
        help="files in it, default %(default)s",
    )
    parser.add_argument(
        "-k",
        default="Vanilla and LoRA",
        help="which tests, as pytest's -k, default %(default)s",
    )
    o = parser.parse_args(argv)
    for name in o.tests:
        if not (o.checkout / name).exists():
            parser.error(f"there is no {name} in {o.checkout}")
    return o


def outcomes(o, *plugin):
    """{test: one of OUTCOMES} of a run in a process of its own, whose output is shown."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            *o.tests,
            "-k",
            o.k,
            "-q",
            "--tb=no",
            "--disable-warnings",
        ]
        done = subprocess.run(
            [*command, "-o", "addopts=", f"--junitxml={report}", *plugin],
            cwd=o.checkout,
        )
        if not report.exists():
            sys.exit(
                f"pytest ended with exit code {done.returncode} and without a report"
            )
        cases = list(ElementTree.parse(report).iter("testcase"))
    return {
        f"{case.get('classname')}::{case.get('name')}": next(
            (c.tag for c in case if c.tag in OUTCOMES),
            "passed",
        )
        for case in cases
    }


def main(argv=None):
    o = options(argv)
    stock, fused = outcomes(o), outcomes(o, "-p", __spec__.name)
    print(f"{'':10}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES))
    for name, run in ("PEFT", stock), ("peftops", fused):
        counts = Counter(run.values())
        print(f"{name:10}" + "".join(f"{counts[outcome]:10}" for outcome in OUTCOMES))
    differ = [test for test in {**stock, **fused} if stock.get(test) != fused.get(test)]
    for test in differ:
        before = stock.get(test, "absent")
        after = fused.get(test, "absent")
        print(f"{test}: {before} with PEFT, {after} with peftops")
    if "passed" not in stock.values():
        print("no test passed with PEFT, so nothing was compared")
        return 1
    print(f"{len(differ)} differ" if differ else "every outcome is the same")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
