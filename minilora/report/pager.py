"""The pager's counters, step by step.

In metrics.jsonl they are totals since the process began, so a step's own share is the difference to the step before.  A resumed
run is another process, which counts from zero: where any of the five falls, a step's totals are its own.
"""
from __future__ import annotations

import numpy as np

from minilora.metrics import Floats
from minilora.report.markup import Child, Markup, tag
from minilora.report.parts import byte_text, byte_unit, figure, legend, steps_axis
from minilora.report.runfiles import COUNTERS, Metrics, RunFiles
from minilora.report.svg import Frame, linear_axis
from minilora.report.training import raw_and_smooth

SHARE_OF_WAITING = 0.2      # from which the page suggests a larger budget


def per_step(totals: dict[str, Floats]) -> dict[str, Floats]:
    """What each counter grew by at each step.

    Args: totals: (S,) by counter, in order of steps; the first step is its process's first.
    Returns: (S,) by counter, nowhere negative.
    """
    before = {name: np.concatenate([[0.0], values[:-1]]) for name, values in totals.items()}
    anew = np.any([totals[name] < before[name] for name in totals], axis=0)
    return {name: np.where(anew, totals[name], totals[name] - before[name]) for name in totals}


def paged_steps(metrics: Metrics) -> tuple[Floats, dict[str, Floats]]:
    """Steps that have all five counters, and what each grew by there."""
    whole = ~np.any([np.isnan(metrics.columns[name]) for name in COUNTERS], axis=0)
    return metrics.steps[whole], per_step({name: metrics.columns[name][whole] for name in COUNTERS})


def pager_section(run: RunFiles) -> Markup | None:
    """Faults, bytes and waiting at each step; None for a run whose optimizer keeps no pages."""
    if run.config.optimizer != "paged_adamw":
        return None
    budget = (f"Both moments of AdamW lie in pages of {run.config.page_bytes:,} bytes, at most {run.config.resident_mib:g} MiB "
              "of them in fast memory at a time.")
    steps, grown = paged_steps(run.metrics)
    if not len(steps):
        return tag("section", tag("h2", "Pager"), tag("p", budget, " This run's metrics have no counters of it."))
    evicted_at, evicted = run.metrics.series("evicted_bytes")
    retries = [(float(step), f"step {step:.0f}: out of memory; {byte_text(size)} of pages put out, the step done again")
               for step, size in zip(evicted_at[evicted > 0], evicted[evicted > 0], strict=True)]
    mark = [("oom", "out of memory, step done again")] if retries else []

    def chart(title: str, said: str, lines: list[tuple[str, str, Floats]], at: Floats, y_title: str, percent: bool = False
              ) -> Markup:
        top = max((float(values.max()) for _, _, values in lines if len(values)), default=0)
        frame = Frame(steps_axis(run.metrics), linear_axis(0, top, y_title, percent=percent))
        marks: list[Child] = [frame.upright(step, "oom", text) for step, text in retries]
        drawn = frame.draw(f"{title} at each step", *marks, *[
            raw_and_smooth(frame, at, values) if len(lines) == 1 else frame.line(at, values, style)
            for style, _, values in lines])
        return figure(title, drawn, said, legend([(style, name) for style, name, _ in lines if len(lines) > 1] + mark))

    unit, scale = byte_unit(max(grown["bytes_in"].max(), grown["bytes_out"].max()))
    seconds = run.metrics.columns["seconds"][np.isin(run.metrics.steps, steps)]
    timed = seconds > 0
    share = grown["stall_seconds"][timed] / seconds[timed]
    save_every = run.config.save_every
    checkpoint = (f" A checkpoint (every {save_every:,} steps) reads every page, which counts for the step after it."
                  if 0 < save_every < steps[-1] else "")
    charts = [
        chart("Faults and evictions", "A fault is a page that was wanted and not there; an eviction is one that was put out to "
              "make room. Without a budget to keep there is one fault for each page, once." + checkpoint,
              [("main", "faults", grown["faults"]), ("second", "evictions", grown["evictions"])], steps, "pages a step"),
        chart("Bytes moved", "What was read back into fast memory and written out of it; a page that was never written is not "
              "read, one that did not change is not written.",
              [("main", "in", grown["bytes_in"] / scale), ("second", "out", grown["bytes_out"] / scale)], steps,
              f"{unit} a step"),
        chart("Waiting for pages", "The part of a step in which the optimizer stood still until a page arrived. On a GPU the "
              "stream waits and not the program, so there it stays near zero.",
              [("main", "waiting", share)], steps[timed], "share of the step's time", percent=True)]
    waited = grown["stall_seconds"][timed].sum() / seconds[timed].sum() if timed.any() else 0.0
    summary = (f"{grown['faults'].sum():,.0f} faults, {byte_text(grown['bytes_in'].sum())} in and "
               f"{byte_text(grown['bytes_out'].sum())} out in {len(steps):,} steps; {waited:.1%} of their time was spent "
               "waiting.")
    if waited > SHARE_OF_WAITING:
        summary += " A larger --resident-mib would shorten them."
    told = f"Steps that ran out of memory: {len(retries):,}." if retries else "No step ran out of memory."
    listed = tag("ul", [tag("li", text) for _, text in retries[:20]],
                 tag("li", f"and {len(retries) - 20:,} more") if len(retries) > 20 else None) if retries else None
    return tag("section", tag("h2", "Pager"), tag("p", f"{budget} {summary} {told}"), listed,
               tag("div", charts, class_="charts"))
