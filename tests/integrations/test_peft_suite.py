"""The plugin that runs PEFT's tests on peftops, tried on tests of our own."""

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.tuners.lora import model
from peftops.bench.proof import peft_suite
from tiny import single

TESTS = """
import io, peft, pytest, torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftops.integrations.peft import Fused


def layer(base, **config):
    config = peft.LoraConfig(target_modules=["0"], r=2, **config)
    return peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]


@pytest.mark.parametrize("dora", [False, True])
def test_is_peft(dora):
    made = layer(nn.Linear(8, 6), use_dora=dora, init_lora_weights=False)
    with torch.no_grad():
        assert repr(made).startswith("lora.Linear(") and made(torch.ones(3, 8)).shape == (3, 6)
    if isinstance(made, Fused):
        assert all("gain" in magnitude._buffers for magnitude in made.magnitudes().values())
    torch.save(made, file := io.BytesIO())
    assert type(torch.load(io.BytesIO(file.getvalue()), weights_only=False)) is type(made)


def test_is_stock():
    assert type(layer(nn.Linear(8, 6))) is peft.tuners.lora.layer.Linear


def test_is_fused():
    assert isinstance(layer(Conv1D(8, 6), fan_in_fan_out=True), Fused)


def test_embeddings_are_left_alone():
    assert type(layer(nn.Embedding(8, 6))) is peft.tuners.lora.layer.Embedding


@pytest.mark.skip
def test_is_skipped():
    pass
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder like PEFT's, whose pyproject.toml has an option that must not be read."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_custom_models.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\naddopts = ["--no-such-option"]\n'
    )
    return tmp_path


def test_tests_run_without_and_with_peftops_and_what_differs_is_named(checkout, capfd):
    assert peft_suite.main([str(checkout), "-k", "test"]) == 1
    lines = capfd.readouterr().out.splitlines()
    words = [line.split() for line in lines]
    assert ["PEFT", "4", "1", "0", "1"] in words
    assert ["peftops", "4", "1", "0", "1"] in words
    assert lines[-3:] == [
        "tests.test_custom_models::test_is_stock: passed with PEFT, failure with peftops",
        "tests.test_custom_models::test_is_fused: failure with PEFT, passed with peftops",
        "2 differ",
    ]
    assert [line for line in lines if line.startswith("peftops: ")] == [
        "peftops: calls of LoRA layers: 2 fused"
    ]


@pytest.mark.parametrize(
    "runs, code, says",
    [
        ([{"a": "passed", "b": "failure"}] * 2, 0, "every outcome is the same"),
        (
            [{"a": "passed", "b": "skipped"}, {"a": "passed"}],
            1,
            "b: skipped with PEFT, absent with peftops\n1 differ",
        ),
        ([{}, {}], 1, "no test passed with PEFT, so nothing was compared"),
        ([{"a": "error"}] * 2, 1, "no test passed with PEFT, so nothing was compared"),
    ],
)
def test_verdicts(checkout, monkeypatch, capsys, runs, code, says):
    remaining = iter(runs)
    monkeypatch.setattr(peft_suite, "outcomes", lambda *args: next(remaining))
    assert peft_suite.main([str(checkout)]) == code
    assert capsys.readouterr().out.endswith(says + "\n")


def test_what_is_no_checkout_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        peft_suite.main([str(tmp_path)])
    assert (
        f"there is no tests/test_custom_models.py in {tmp_path}"
        in capsys.readouterr().err
    )


def test_the_plugin_leaves_nothing_behind():
    before = model.dispatch_default
    peft_suite.pytest_configure()
    assert type(single().base_model.model.lin) is peft_suite.Linear
    peft_suite.pytest_unconfigure()
    assert model.dispatch_default is before
    assert type(single().base_model.model.lin) is peft.tuners.lora.layer.Linear
