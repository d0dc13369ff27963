"""What `peftops demo` shows of its result: a table, remarks and the loss curves."""

from itertools import cycle
from statistics import median

from . import replace

WARM_UP = 2  # rounds that do not count


def numbers(c, peak, before, after, result, frozen, size):
    """What the table shows of one contender.

    Args:
        c: the contender.
        peak: bytes of memory.
        before: (loss on held-out text, loss on unrelated text).
        after: the same.
        result: settings of the run.
        frozen: {round: seconds of the frozen model's step}.
        size: bytes of the checkpoint.
    """
    import peftops

    from .demo_contenders import ADAPTERS, FULL

    seconds = median(c.steps[WARM_UP:] or c.steps)
    trained = sum(p.numel() for p in c.trained)
    total = result["parameters"]
    if c.label != FULL:
        total += trained
    report = peftops.report(c.model) if c.label in ADAPTERS else None
    return {
        "step_s": seconds,
        "tokens_per_s": result["batch"][0] * result["batch"][1] / seconds,
        "over_frozen": median(c.passes[i] / took for i, took in frozen.items()),
        "peak_bytes": peak,
        "trained": trained,
        "trained_share": trained / total,
        "checkpoint_bytes": size,
        "held_out": [before[0], after[0]],
        "unrelated": [before[1], after[1]],
        "fused": report and report.fused,
        "fallback": report and report.fallback,
        "norms": report and report.norms,
        "reasons": dict(report.reasons) if report else {},
        "losses": c.losses,
    }


def table(result):
    from rich.table import Table

    batch, tokens = result["batch"]
    title = (
        "{model}, {dtype}\nrank {rank}, dropout {dropout},"
        " {steps} steps of {0} × {1} tokens on {device}"
    )
    view = Table(title=title.format(batch, tokens, **result))
    view.add_column("")
    for label in result["contenders"]:
        view.add_column(label, justify="right")
    for label, why in result["absent"].items():
        view.add_column(f"{label}\n({why})", justify="right")
    rows = {
        "seconds per step (median)": "{step_s:.3f}",
        "tokens per second": "{tokens_per_s:.0f}",
        "forward + backward ÷ frozen model": "{over_frozen:.2f}",
        "peak memory": "{peak_mb:.0f} MB",
        "trained parameters": "{trained:,} ({trained_share:.2%})",
        "checkpoint": "{checkpoint_mb:.1f} MB",
        "held-out loss": "{held_out[0]:.3f} → {held_out[1]:.3f}",
        "loss on unrelated text": "{unrelated[0]:.3f} → {unrelated[1]:.3f}",
        "layers fused / fallen back": "{layers}",
    }
    shown = []
    for c in result["contenders"].values():
        fused = "–" if c["fused"] is None else f"{c['fused']} / {c['fallback']}"
        peak_mb = c["peak_bytes"] / 1e6
        checkpoint_mb = c["checkpoint_bytes"] / 1e6
        shown.append(
            c
            | {
                "peak_mb": peak_mb,
                "checkpoint_mb": checkpoint_mb,
                "layers": fused,
            }
        )
    for name, form in rows.items():
        view.add_row(
            name, *(form.format(**c) for c in shown), *("–" for _ in result["absent"])
        )
    return view


def remarks(result):
    """What a reader of the table should know."""
    from .demo_contenders import FULL, METHODS, PACKED

    runs = result["contenders"]
    yield (
        f"The frozen model's forward + backward alone takes {result['frozen_s']:.3f} s"
        " (measured in the same rounds)."
    )
    for labels in METHODS.values():
        if labels[1:] and labels[1] in runs:
            yield from remarks_on_pair(result, *labels)
    if not runs.keys().isdisjoint(PACKED):
        yield (
            "4-bit bases are NF4 with double quantization in all linear layers but the head;"
            " losses start from there."
        )
    if FULL in runs:
        yield (
            "The checkpoint of full fine-tuning is not written; its size is that of the weights"
            " in the model's dtype."
        )
    if result["device_type"] == "cpu":
        how = "growth of resident memory"
    else:
        how = "memory that torch allocated"
    yield f"Peak memory is the {how} in a process of its own, weights included."
    if result["of_full"] is not None:
        yield remark_on_full(result)


def remarks_on_pair(result, stock, ours):
    """How ours did beside stock PEFT, and which layers fell back."""
    runs = result["contenders"]
    if stock in runs:
        pairs = zip(runs[stock]["losses"], runs[ours]["losses"], strict=True)
        most = max(abs(a - b) for a, b in pairs)
        ratio = runs[ours]["step_s"] / runs[stock]["step_s"]
        doubt = " Too few steps to be sure." if result["steps"] < 10 + WARM_UP else ""
        yield f"{ours} takes {ratio:.2f} × the time of {stock} for a step.{doubt}"
        if result["dropout"]:
            why = "the dropout masks differ"
        else:
            why = "same arithmetic, other roundings"
        yield f"Their training losses differ by {most:.4f} at most ({why})."
    for reason, layers in runs[ours]["reasons"].items():
        yield f"{layers} layers of {ours} fell back to PEFT's own forward: {reason}."


def remark_on_full(result):
    """How much of full fine-tuning's progress the others make."""
    from .demo_contenders import FULL, RATES

    shares = result["of_full"]
    if not shares:
        return (
            "Full fine-tuning does not lower the held-out loss here,"
            " so there is nothing to compare the others with."
        )
    before, after = result["contenders"][FULL]["held_out"]
    rates = f"learning rate {RATES[FULL]:g}, of the others {max(RATES.values()):g}"
    reached = "; ".join(f"{share:.0%} by {label}" for label, share in shares.items())
    return (
        "Of what full fine-tuning takes off the held-out loss"
        f" ({before - after:.3f}; {rates}): {reached}."
    )


def of_full(runs):
    """{label: share}: how much of full fine-tuning's decrease of the held-out loss it reaches.

    Empty if full fine-tuning decreases nothing. None if it did not run, or ran alone.
    """
    from .demo_contenders import FULL

    if FULL not in runs or len(runs) == 1:
        return None
    before, after = runs[FULL]["held_out"]
    if not after < before:
        return {}
    losses = {label: c["held_out"][1] for label, c in runs.items() if label != FULL}
    return {label: (before - loss) / (before - after) for label, loss in losses.items()}


def draw(result, path):
    """The loss curves, with the held-out loss at both ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    styles = cycle(("-", "--", ":", "-."))
    for label, c in result["contenders"].items():
        steps = range(1, len(c["losses"]) + 1)
        name = f"{label}: {c['step_s']:.3f} s per step"
        (line,) = axes.plot(steps, c["losses"], next(styles), label=name)
        axes.plot([0, len(steps)], c["held_out"], "o", color=line.get_color())
    axes.set(
        xlabel="step (dots: held-out text)",
        ylabel="loss",
        title=f"{result['model']}, rank {result['rank']}",
    )
    axes.legend()
    replace(path, lambda beside: figure.savefig(beside, format="png", dpi=120))
    pyplot.close(figure)
