"""@op: makes a torch op of a contract, which checks the op's inputs and allocates its outputs."""

import inspect

import torch

from . import backends
from ._ready import device_of, elsewhere, ready
from ._replay import Replay, run_and_plan

LIBRARY = torch.library.Library("peftops", "FRAGMENT")
CONTRACTS = {}  # by the op's name
MOST = 2048  # plans that an op keeps


def op(contract):
    """Registers torch.ops.peftops.<contract>; its schema and fake kernel are the contract itself.

    Returns a function for the op. If no tracer, transform or subclass has to see the call, it runs
    the backend's function directly, which saves the dispatcher's 11 µs, and it replays what it can.
    """
    name = contract.__name__
    CONTRACTS[name] = contract

    def run(args, plan=False):
        """The outputs, and the plan of how they were filled, or None without one."""
        outputs = contract(*args)
        fill = backends.find(name, args[0])
        single = not isinstance(outputs, tuple)
        every = (outputs, *args) if single else (*outputs, *args)
        if plan and backends.can_replay(fill):
            return outputs, run_and_plan(lambda: fill(*every), single, args, outputs)
        fill(*every)
        return outputs, None

    def run_for_dispatcher(plan, *args):
        """What the dispatcher calls if there is no plan for these arguments."""
        plain = ready(contract, args, subclasses=True)
        with device_of(args[0]):
            return run(plain, plan and plain is args)

    def dispatched(*args):
        # without this, ops with out= refuse inputs that require grad
        with torch._C._AutoDispatchBelowAutograd():
            return planned_for_dispatcher(*args)

    overload = register(name, contract, dispatched)

    def run_directly(plan, *args):
        """What a direct call does if there is no plan for these arguments."""
        plain = ready(contract, args)
        if plain is None:
            return overload(*args), None
        if elsewhere(args[0]):
            with torch.cuda.device(args[0].device):
                return direct(*plain), None
        return run(args, plan) if plain is args else (direct(*plain), None)

    direct = planned(run_directly)
    planned_for_dispatcher = planned(run_for_dispatcher)

    def run_or_dispatch(*args):
        watched = (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._get_tracing_state()
            or torch._C._are_functorch_transforms_active()
        )
        return overload(*args) if watched else direct(*args)

    call = taking(contract, run_or_dispatch)
    call.direct = direct
    return call


def register(name, contract, run):
    """torch.ops.peftops.<name>, with the contract as schema and as fake kernel.

    run gets all arguments; the dispatcher itself leaves out last ones that equal their defaults.
    """
    LIBRARY.define(name + torch.library.infer_schema(contract, mutates_args=()))
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


def expect(row, name, tensor, shape, *dtypes):
    """Raises unless a tensor has this shape and one of these dtypes; None is always accepted.

    Every contract checks its tensors here, so that all errors have one form.
    """
    if tensor is None or (tensor.shape == shape and tensor.dtype in dtypes):
        return
    if tensor.shape != shape:
        raise ValueError(
            f"{row}: {name} must be {tuple(shape)}, got {tuple(tensor.shape)}"
        )
    wanted = " or ".join(map(str, dict.fromkeys(dtypes)))
    raise TypeError(f"{row}: {name} must be {wanted}, got {tensor.dtype}")
