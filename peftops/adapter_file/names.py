"""Which names of an adapter's modules its config matches, by PEFT's rules, in bounded time.

A regex that comes from somebody else may run for ever. Plain names are matched in this process.
For everything else this file runs as a script, which is killed after SECONDS. So it imports
nothing but the standard library.
"""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SECONDS = 10  # for the script
PLAIN = re.compile(r"[\w.-]*", re.ASCII)  # as a regex it matches in linear time
SMALL = 100_000  # pairs of a name and a pattern that are compared without the script
LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."  # PEFT's, where layers_pattern is not given


Question = dict[str, Any]  # see `answer`
Answer = dict[str, Any]


def match(question: Question) -> Answer:
    """What answer(question) returns, within SECONDS.

    Raises:
        ValueError: a regex is invalid, or takes too long.
    """
    names = len(question["modules"]) + len(question["keys"])
    patterns = list(patterns_in(question))
    if len(patterns) * names <= SMALL and all(
        PLAIN.fullmatch(pattern) for pattern in patterns
    ):
        return answer(question)
    return answer_of_script(question)


def answer_of_script(question: Question) -> Answer:
    """What answer(question) returns, from a process that is killed after SECONDS."""
    command = [sys.executable, "-I", "-S", __file__]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(question),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"matching its names takes more than {SECONDS} seconds"
        ) from None
    if done.returncode:
        raise ValueError("its names cannot be matched")
    result = json.loads(done.stdout)
    if "error" in result:
        raise ValueError(result["error"])
    return result


def patterns_in(question: Question) -> Iterator[str]:
    """Everything in the config that is compared with names."""
    fields = (
        "target_modules",
        "exclude_modules",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
    )
    for name in (*fields, "modules_to_save", "target_parameters"):
        yield from as_list(question[name])


def as_list(value: str | list[str] | None) -> list[str]:
    """The strings of a field that is a string, a list, or null."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def compiled(field: str, pattern: str, whole: str) -> re.Pattern[str]:
    """re.compile(whole), where whole is what PEFT makes of a pattern of the field."""
    try:
        return re.compile(whole)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{field} {pattern[:80]!r} is no regex: {error}") from None


def answer(question: Question) -> Answer:
    """Matches the fields of adapter_config.json with names.

    Args:
        question: the fields, and beside them "modules" (names of LoRA layers in the base model)
            and "keys" (names of the other tensors).

    Returns:
        targets: for each module "module" where target_modules match it, "parameter" where
            target_parameters do, or else the field that leaves it out.
        ranks: for each module the index of the first rank_pattern that matches it, or None.
        alphas: the same of alpha_pattern.
        saved: for each key, whether it belongs to a module of modules_to_save.
        unmet: the names in target_modules, layers_to_transform and modules_to_save that match
            nothing, by field.

    Raises:
        ValueError: a pattern is no regex.
    """
    modules = question["modules"]
    keys = question["keys"]
    target = target_rule(question)
    targets = [target(module) for module in modules]
    patterns = {}
    for field in ("rank_pattern", "alpha_pattern"):
        patterns[field] = [
            compiled(field, key, rf"(.*\.)?({key})$").match for key in question[field]
        ]
    saved = [f"{name}." for name in question["modules_to_save"]]
    return {
        "targets": targets,
        "ranks": [first_match(patterns["rank_pattern"], module) for module in modules],
        "alphas": [
            first_match(patterns["alpha_pattern"], module) for module in modules
        ],
        "saved": [any(name in key for name in saved) for key in keys],
        "unmet": {
            "target_modules": unmet_targets(question, modules),
            "layers_to_transform": unmet_layers(question, modules, targets),
            "modules_to_save": [
                name[:-1] for name in saved if not any(name in key for key in keys)
            ],
        },
    }


def first_match(rules: Iterable[Callable[[str], object]], module: str) -> int | None:
    """The index of the first rule that matches, or None."""
    return next((index for index, rule in enumerate(rules) if rule(module)), None)


def target_rule(question: Question) -> Callable[[str], str]:
    """PEFT's check_target_module_exists, as a function of a name."""
    excluded = name_rule("exclude_modules", question["exclude_modules"])
    saved = [
        compiled("modules_to_save", name, rf"(^|.*\.){name}($|\..*)").match
        for name in question["modules_to_save"]
    ]
    wanted = question["target_modules"]
    targeted = name_rule("target_modules", wanted)
    owners = tuple(
        f".{name}".rpartition(".")[0] for name in question["target_parameters"]
    )
    # PEFT ignores the layer of a module whose whole name is in the list.
    whole = frozenset(wanted if isinstance(wanted, list) else ())
    layer = layer_rule(question["layers_pattern"])
    layers = question["layers_to_transform"]
    if isinstance(layers, int):
        layers = [layers]
    if isinstance(wanted, str):  # with a regex PEFT ignores the layer too
        layers = None

    def target(module):
        if excluded(module):
            return "exclude_modules"
        if any(match(module) for match in saved):
            return "modules_to_save"
        if wanted is None:  # PEFT has names for some types of models
            return "parameter" if f".{module}".endswith(owners) else "module"
        if targeted(module):
            if not layers or module in whole or layer(module) in layers:
                return "module"
            left_out = "layers_to_transform"
        else:
            left_out = "target_modules"
        return "parameter" if f".{module}".endswith(owners) else left_out

    return target


def name_rule(field: str, wanted: str | list[str] | None) -> Callable[[str], object]:
    """A function that says whether a name is one of these or ends with one. A string is a regex."""
    if wanted is None:
        return lambda module: False
    if isinstance(wanted, list):
        ends = tuple(f".{name}" for name in wanted)
        return lambda module: f".{module}".endswith(ends)
    if field == "target_modules" and wanted.lower() == "all-linear":
        return lambda module: True
    return compiled(field, wanted, wanted).fullmatch


def layer_rule(layers_pattern: str | list[str] | None) -> Callable[[str], int | None]:
    """A function of a name: the index of its layer, or None."""
    wholes = {
        pattern: rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
        for pattern in as_list(layers_pattern)
    }
    wholes = wholes or {"": LAYER}
    rules = [
        compiled("layers_pattern", pattern, whole).match
        for pattern, whole in wholes.items()
    ]

    def layer(module):
        matched = next(filter(None, (rule(module) for rule in rules)), None)
        index = matched and matched.groupdict().get("idx")
        return None if index is None else int(index)

    return layer


def unmet_targets(question: Question, modules: list[str]) -> list[str]:
    """The names of target_modules that no module has."""
    names = question["target_modules"]
    if not isinstance(names, list):
        return []
    dotted = [f".{module}" for module in modules]
    return [
        name
        for name in names
        if not any(module.endswith(f".{name}") for module in dotted)
    ]


def unmet_layers(
    question: Question, modules: list[str], targets: list[str]
) -> list[int]:
    """The layers of layers_to_transform in which no module is targeted."""
    layers = question["layers_to_transform"]
    if not isinstance(layers, list):
        return []
    layer = layer_rule(question["layers_pattern"])
    pairs = zip(modules, targets, strict=True)
    met = {layer(module) for module, target in pairs if target == "module"}
    return [index for index in layers if index not in met]


def main() -> None:
    warnings.simplefilter("ignore")  # of re
    question = json.load(sys.stdin)
    try:
        result = answer(question)
    except ValueError as error:
        result = {"error": str(error)}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
