"""peftops check: says whether PEFT, vLLM and SGLang load a saved LoRA adapter, and all of it.

It reads the two files of the adapter and no model (peftops bench is about kernels). A
finding is `broken`: the files contradict themselves; `refused`: loading raises; `dropped`: it
loads and gives other numbers than in training; or a `note`: the base model or a flag decides.
Exit code 1: something is broken, refused or dropped.
"""

import dataclasses
import sys
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from .. import adapter_file
from ..adapter_file import listed
from . import Parser, escaped, need, refusing, sentence
from .check_servers import UNREAD, for_sglang, for_vllm

SHOWN = 8  # of what is broken
WIDEST = 400  # characters of a row
BAD = "broken", "refused", "dropped"
VARIANTS = *UNREAD, "velora_config"  # they have lora_ tensors of their own
DELTA = ".token_adapter.trainable_tokens_delta"
HEADS = (
    "classifier",
    "score",
)  # PEFT adds both to modules_to_save, whichever the model has


def options(argv):
    parser = Parser("peftops check", description=__doc__)
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        type=Path,
        help="a folder with adapter_config.json",
    )
    parser.add_argument(
        "--for",
        dest="target",
        choices=list(TARGETS),
        help="who shall load it; without it, all of them",
    )
    return parser.parse_args(argv)


def main(argv=None):
    o = options(argv)
    if o.target == "peft":
        need("peft", extra="peft")
    need("safetensors", extra="peft")
    with refusing(printable):
        adapter = adapter_file.load(o.adapter)
    rows = report(adapter, [o.target] if o.target else list(TARGETS))
    print(printable(str(adapter)))
    for target, verdict, text in rows:
        print(printable(f"{target:7} {verdict:8} {text}".rstrip()))
    return int(any(verdict in BAD for _, verdict, _ in rows))


def report(adapter, targets):
    """(target, verdict, text) of each finding. The target "files" stands for all targets."""
    findings = list(adapter_file.faults(adapter))
    broken = [("files", *finding) for finding in findings if finding[0] == "broken"]
    notes = [("files", *finding) for finding in findings if finding[0] != "broken"]
    if len(broken) > SHOWN:
        more = len(broken) - SHOWN
        broken[SHOWN:] = [("files", "broken", f"and {more} more")]
    rows = broken + notes
    for target in targets:
        findings = list(TARGETS[target](adapter))
        if not any(verdict in BAD for verdict, _ in findings):
            findings.insert(0, ("ok", ""))
        rows += [(target, *finding) for finding in findings]
    return rows


def printable(text):
    """One line that every terminal shows. A key may hold control characters, or be long."""
    encoding = sys.stdout.encoding or "utf-8"
    return (
        escaped(shortened(text)).encode(encoding, "backslashreplace").decode(encoding)
    )


def shortened(text):
    """Both ends of a long text."""
    half = WIDEST // 2
    return text if len(text) <= WIDEST else f"{text[:half]} ... {text[-half:]}"


def for_peft(adapter):
    """Which tensors PEFT misses or skips, and what the installed PEFT says of the config."""
    if adapter.is_lora:
        yield from not_loaded(adapter)
        yield from trained_tokens(adapter)
    yield from modules_to_save(adapter)
    if find_spec("peft") is None:
        yield (
            "note",
            "PEFT is not installed, so the config was not compared with its fields",
        )
    else:
        yield from as_config(adapter.config)


def as_config(config):
    """What the config class of the installed PEFT says."""
    from packaging.version import Version
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    here = version("peft")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(config["peft_type"])
    if config_class is None:
        yield "refused", f"peft_type {config['peft_type']}: unknown to PEFT {here}"
        return
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := sorted(
        name for name, value in config.items() if name not in known and value
    ):
        yield "dropped", f"{listed(unknown)}: unknown to PEFT {here}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config_class(
                **{name: value for name, value in config.items() if name in known}
            )
            newer = Version(config.get("peft_version") or "0") > Version(here)
    except Exception as error:  # each field has checks of its own
        yield "refused", sentence(error)
        return
    if newer:
        yield (
            "note",
            f"PEFT {config['peft_version']} saved it, and PEFT {here} is installed",
        )


def not_loaded(adapter):
    """The tensors that PEFT would not load: it looks each module and key up by its name."""
    wrapped = {key for keys in adapter.wrapped.values() for key in keys}
    lora = [
        stored.key
        for tensors in adapter.modules.values()
        for stored in tensors.values()
    ]
    keys = [key for key in lora if key not in wrapped]
    if bare := [key for key in keys if not key.startswith(adapter_file.PREFIX)]:
        yield (
            "dropped",
            f"{listed(bare)}: the keys that PEFT loads begin with {adapter_file.PREFIX}",
        )
    if twice := [
        module for module in adapter.modules if module.startswith(adapter_file.PREFIX)
    ]:
        yield "dropped", f"{listed(twice)}: {adapter_file.PREFIX} is there twice"
    if strangers := [key for key, name in adapter.named.items() if name != "default"]:
        yield "dropped", f"{listed(strangers)}: the name of an adapter is in the keys"
    elif adapter.named:
        yield (
            "note",
            f"{listed(list(adapter.named))}: PEFT loads such keys under the name default alone",
        )
    yield from untargeted(adapter)
    yield from unexpected(adapter)


def untargeted(adapter):
    """Where the names in the config and those of the tensors do not match."""
    left_out = {}
    for module, target in adapter.targets.items():
        if target not in ("module", "parameter") and not may_be_tied(
            module, adapter.config
        ):
            left_out.setdefault(target, []).append(module)
    for name, modules in left_out.items():
        yield (
            "dropped",
            f"{listed(modules)}: not of the modules that {name} in {adapter_file.CONFIG} asks for",
        )
    for name in ("target_modules", "layers_to_transform"):
        if unmet := adapter.unmet[name]:
            yield (
                "note",
                f"{name}: no tensor is of {listed(list(map(str, unmet)))},"
                " which the base model may lack",
            )


def unexpected(adapter):
    """The tensors that PEFT does not save with LoRA layers."""
    strange = [
        key
        for key in adapter.others
        if key not in adapter.named and not expected(key, adapter)
    ]
    if lost := [key for key in strange if not of_base(key)]:
        yield "dropped", f"{listed(lost)}: no part of a LoRA adapter"
    if base := [key for key in strange if of_base(key)]:
        yield (
            "note",
            f"{listed(base)}: no part of a LoRA adapter;"
            " it replaces the weight of a base model that has it",
        )


def may_be_tied(module, config):
    """Whether PEFT may have adapted the module because it is tied to another one.

    Such a module is outside of all layers, so no part of its name is a number.
    """
    if not config.get("ensure_weight_tying"):
        return False
    return not any(name.isdigit() for name in module.split("."))


def of_base(key):
    """Whether a base model may have such a weight."""
    if not key.startswith(adapter_file.PREFIX) or ".lora_" in key:
        return False
    return key.endswith((".weight", ".bias"))


def expected(key, adapter):
    """Whether PEFT saves such a key beside those of LoRA layers."""
    if not key.startswith(adapter_file.PREFIX):
        return False
    variant = ".lora_" in key and any(adapter.config.get(name) for name in VARIANTS)
    bias = key.endswith(".bias") and adapter.config["bias"] != "none"
    resized = key.endswith((".embed_tokens.weight", ".lm_head.weight"))
    adapted = adapter_file.without_prefix(key).removesuffix(".base_layer.weight")
    base = key.endswith(".base_layer.weight") and adapted in adapter.modules
    return (
        key in adapter.saved
        or key.endswith(DELTA)
        or variant
        or bias
        or resized
        or base
    )


def trained_tokens(adapter):
    """Whether the tensors of trainable_token_indices are there, with a row for each index."""
    wanted = adapter.config.get("trainable_token_indices") or []
    lists = wanted.values() if isinstance(wanted, dict) else [wanted]
    rows = {len(indices) for indices in lists}
    deltas = [stored for key, stored in adapter.tensors.items() if key.endswith(DELTA)]
    if not wanted and not deltas:
        return
    if not wanted:
        yield (
            "dropped",
            f"{deltas[0].key}: trainable_token_indices is not in {adapter_file.CONFIG}",
        )
    elif not deltas:
        yield "refused", f"trainable_token_indices: no tensor is a {DELTA[1:]}"
    elif wrong := [
        stored for stored in deltas if not stored.shape or stored.shape[0] not in rows
    ]:
        yield (
            "refused",
            f"{wrong[0].key} is {wrong[0].shape}:"
            " trainable_token_indices has another number of rows",
        )


def modules_to_save(adapter):
    """Which of modules_to_save have no tensor. PEFT refuses them if the base model has them."""
    missing = adapter.unmet["modules_to_save"]
    if missing and not adapter.saved:
        yield "refused", f"modules_to_save: no tensor is of {listed(missing)}"
        return
    heads = HEADS if adapter.config.get("task_type") else ()
    if unsaved := [name for name in missing if name not in heads]:
        yield (
            "note",
            f"modules_to_save: no tensor is of {listed(unsaved)}, which the base model may lack",
        )


TARGETS = {"peft": for_peft, "vllm": for_vllm, "sglang": for_sglang}
