"""@op: makes a torch op of a contract, which checks the op's inputs and allocates its outputs."""

import inspect
from functools import partial

import torch

from . import backends
from ._ready import device_of, elsewhere, expect_no_grad, ready, watched
from ._replay import Replay, run_and_plan

LIBRARY = torch.library.Library("peftops", "FRAGMENT")
CONTRACTS = {}  # by the op's name
MOST = 2048  # plans that an op keeps


def op(contract):
    """Registers torch.ops.peftops.<contract>; its schema and fake kernel are the contract itself.

    Returns a function for the op. If no tracer, transform or subclass has to see the call, it runs
    the backend's function directly, which saves the dispatcher's 11 µs, and it replays what it can.
    A contract whose name ends with "_" has no outputs: its op changes the first argument.
    """
    name = contract.__name__
    in_place = name.endswith("_")
    CONTRACTS[name] = contract

    def finished(result, args, plain):
        """The result for args of a call that was made with copies of some of them."""
        if in_place and plain[0] is not args[0]:
            args[0].copy_(plain[0])
        return result

    def run_for_dispatcher(plan, *args):
        """What the dispatcher calls if there is no plan for these arguments."""
        plain = ready(contract, args, subclasses=True)
        with device_of(args[0]):
            result = run(contract, plain, plan and plain is args)
            return finished(result, args, plain)

    def dispatched(*args):
        if in_place:
            expect_no_grad(name, args)
        # without this, ops with out= refuse inputs that require grad
        with torch._C._AutoDispatchBelowAutograd():
            return planned_for_dispatcher(*args)

    overload = register(name, contract, dispatched)

    def run_directly(plan, *args):
        """What a direct call does if there is no plan for these arguments."""
        plain = ready(contract, args)
        if plain is None:
            return overload(*args), None
        if plain is args and not elsewhere(args[0]):
            return run(contract, args, plan)
        with device_of(args[0]):
            return finished((direct(*plain), None), args, plain)

    direct = planned(run_directly)
    planned_for_dispatcher = planned(run_for_dispatcher)

    def run_or_dispatch(*args):
        if watched():
            return overload(*args)
        if in_place:
            expect_no_grad(name, args)
        result = direct(*args)
        if in_place and not args[0].is_inference():
            torch.autograd.graph.increment_version(args[0])
        return result

    call = taking(contract, run_or_dispatch)
    call.direct = direct
    return call


def run(contract, args, plan):
    """The outputs of an op, and the plan of how they were filled, or None without one."""
    outputs = contract(*args)
    fill = backends.find(contract.__name__, args[0])
    single = isinstance(outputs, torch.Tensor)
    made = (outputs,) if single else outputs or ()
    if plan and backends.can_replay(fill):
        body = partial(fill, *made, *args)
        return outputs, run_and_plan(body, single, args, made)
    fill(*made, *args)
    return outputs, None


def register(name, contract, run):
    """torch.ops.peftops.<name>, with the contract as schema and as fake kernel.

    run gets all arguments; the dispatcher itself leaves out last ones that equal their defaults.
    """
    changed = [next(iter(inspect.signature(contract).parameters))]
    mutates = changed if name.endswith("_") else ()
    LIBRARY.define(name + torch.library.infer_schema(contract, mutates_args=mutates))
    LIBRARY.impl(name, taking(contract, run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftops::{name}", contract, lib=LIBRARY)
    return getattr(torch.ops.peftops, name).default


def taking(contract, run):
    """`run` as a function that takes the contract's arguments, by position or by keyword.

    run gets all of them by position. Python binds them in compiled code, which costs a tenth of a
    microsecond where a function of (*args, **named) would cost seven.
    """
    signature = inspect.signature(contract)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    taken = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    text = f"lambda {taken[1:-1]}: run({', '.join(signature.parameters)})"
    function = eval(compile(text, __file__, "eval"), {"run": run})
    function.__name__ = function.__qualname__ = contract.__name__
    return function


def planned(run):
    """A function of an op's arguments that returns the outputs.

    It plays the plan it has for arguments like these, or calls run(whether to make a plan, *args),
    which returns the outputs and a plan or None.
    """
    if Replay:
        return Replay(run, backends.FORCED, backends.forced, MOST)
    return lambda *args: run(False, *args)[0]
