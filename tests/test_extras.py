"""The extras of the package, and the sentence that names one where a library is missing."""

import ast
import subprocess
import sys

import pytest
from tree import PYTHON, ROOT, name, nodes

from peftops.integrations import transformers as integration

SENTENCE = "ModuleNotFoundError: {} is not installed: pip install 'peftops[peft]'"
USES = [  # statements that need PEFT
    "import peftops; peftops.patch",
    "from peftops import report",
    "import peftops.integrations.peft.mlp",
    "import peftops.integrations.liger",
    "from peftops.integrations.transformers import PeftopsCallback",
]
HIDE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name == {!r} else self.finder.find_spec(name, path, target)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
"""


TRY = """
for use in {!r}:
    try:
        exec(use)
    except ImportError as error:
        print(f"{{type(error).__name__}}: {{error}}")
    else:
        print("no error")
"""


def answers(before, *uses):
    """What each statement raises in one process, after the code `before`."""
    code = before + TRY.format(uses)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done
    return done.stdout.splitlines()


def test_without_peft_an_import_names_the_extra():
    assert answers(HIDE.format("peft"), *USES) == [SENTENCE.format("peft")] * len(USES)


def test_without_transformers_an_import_names_the_extra():
    use = "from peftops.integrations.transformers import enable"
    sentence = SENTENCE.format("transformers")
    assert answers(HIDE.format("transformers"), use, USES[0]) == [sentence] * 2


def test_an_older_transformers_is_named(monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers, "__version__", "5.22.2")
    with pytest.raises(
        ImportError, match=r"enable needs transformers 5\.23\.0 or newer"
    ):
        integration.enable()
    assert integration.PeftopsCallback


@pytest.mark.parametrize(
    "inside, shown",
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("from . import no_such_name", "cannot import name 'no_such_name'"),
        ("", "No module named 'peft.tuners'"),
    ],
)
def test_what_fails_inside_peft_is_raised_as_it_is(inside, shown, tmp_path):
    """A broken PEFT must not be called a missing one."""
    package = tmp_path / "peft"
    package.mkdir()
    (package / "__init__.py").write_text(inside)
    before = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    (answer,) = answers(before, USES[0])
    assert shown in answer
    assert "not installed" not in answer


@pytest.fixture(scope="module")
def requirements():
    """Returns closure(extra): the names of all packages that an extra installs."""
    tomllib = pytest.importorskip("tomllib")
    packaging = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def closure(extra):
        packages = set()
        for line in project["optional-dependencies"][extra]:
            requirement = packaging.Requirement(line)
            if requirement.name == "peftops":
                packages.update(*map(closure, requirement.extras))
            else:
                packages.add(requirement.name)
        return packages

    basic = {packaging.Requirement(line).name for line in project["dependencies"]}
    return lambda extra: closure(extra) | basic


def needs():
    """(file, packages, extra or None) of every call of need in the tree."""
    for file in PYTHON:
        if ROOT / "tests" in file.parents:
            continue
        for node in nodes(file):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "need":
                packages = [ast.literal_eval(argument) for argument in node.args]
                named = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
                yield name(file), packages, named.get("extra")


def test_an_extra_installs_what_its_commands_need(requirements):
    extras = set()
    for file, packages, extra in needs():
        if extra:
            extras.add(extra)
            assert set(packages) <= requirements(extra), file
        else:
            assert set(packages) <= {"torch", "triton"}, file
    assert {"demo", "peft"} <= extras


def test_the_extras_hold_each_other_as_they_should(requirements):
    assert {"peft", "transformers"} <= requirements("peft")
    for extra in ("demo", "bench", "trainers"):
        assert requirements("peft") <= requirements(extra)
    assert "rich" not in requirements("bench")
    assert {"trl", "lightning", "accelerate", "datasets"} <= requirements("trainers")
    for extra in ("bench", "demo", "trainers"):
        assert requirements(extra) <= requirements("test")
