"""How good the answers are, and whether their probabilities can be trusted."""
from __future__ import annotations

import numpy as np

from minilora.adapters import WEIGHTS_FILE
from minilora.calibration import BINS, calibration_error, coverage, picked, reliability
from minilora.files import file_sha256
from minilora.metrics import Floats, count_pairs, label_scores, normalize_label, said_of_few_rows
from minilora.report.held import said_of_rows
from minilora.report.markup import Child, Markup, table, tag
from minilora.report.parts import figure, legend, percent, shortened
from minilora.report.runfiles import RunFiles
from minilora.report.scorefiles import ScoreFiles
from minilora.report.svg import Frame, linear_axis, picture

NAMES = {"exact_match": "Exact match", "macro_f1": "Macro-F1", "weighted_f1": "Weighted F1", "cosine": "Cosine"}
SAID = {"exact_match": "answers equal to the reference", "macro_f1": "mean F1 over the labels, each counting the same",
        "weighted_f1": "mean F1, each label by its rows", "cosine": "how close the answer reads; flatters, see the baselines"}
BASELINES = {"shuffled": "the references in random order", "majority": "always the most frequent label"}
MOST_LABELS = 200       # that the table lists
SMALL = 30              # references under which a label's scores are called rough


def interval_bar(score: float, interval: tuple[float, float] | None, baselines: dict[str, float], width: int = 220) -> Markup:
    """A score as a dot on a line from 0 to 1, with its interval and, as ticks, what a guess scores."""
    def place(share: float) -> float:
        return 6 + share * (width - 12)

    parts: list[Child] = [tag("line", x1=place(0), x2=place(1), y1=10, y2=10, class_="grid")]
    parts += [tag("line", tag("title", f"{name}: {value:.3f}"), x1=place(value), x2=place(value), y1=5, y2=15,
                  class_="line guess") for name, value in baselines.items()]
    if interval:
        parts.append(tag("line", tag("title", f"95% interval {interval[0]:.3f} to {interval[1]:.3f}"), x1=place(interval[0]),
                         x2=place(interval[1]), y1=10, y2=10, class_="interval"))
    parts.append(tag("circle", tag("title", f"{score:.3f}"), cx=place(score), cy=10, r=4, class_="dot main"))
    return picture(width, 20, "score between 0 and 1", *parts, class_="bar")


def _other_adapter(found: ScoreFiles, run: RunFiles) -> Markup | None:
    """A warning where the scores are of another adapter than the run holds: it went on since, or the folder is another's."""
    scored, adapter = found.held.scored.get("adapter"), run.folder / WEIGHTS_FILE
    if not isinstance(scored, str) or not adapter.is_file() or file_sha256(adapter) == scored:
        return None
    return tag("p", "These scores are of another adapter than the run folder holds now; evaluate it again.", class_="notice")


def scores_section(found: ScoreFiles, run: RunFiles) -> Markup:
    """The table of scores with their intervals, beside what a guess scores."""
    baselines = [*(name for name in BASELINES if name in found.baselines), *sorted(found.baselines.keys() - BASELINES.keys())]
    rows: list[list[Child]] = []
    for name, score in found.scores.items():
        interval = found.intervals.get(name)
        guesses = {guess: value for guess in baselines if isinstance(value := found.baselines[guess].get(name), float)}
        rows.append([[tag("strong", NAMES[name]), tag("span", SAID[name], class_="quiet block")], f"{score:.3f}",
                     f"{interval[0]:.3f} – {interval[1]:.3f}" if interval else "–", interval_bar(score, interval, guesses),
                     *[f"{guesses[guess]:.3f}" if guess in guesses else "–" for guess in baselines]])
    for k, share in found.held.top_k.items():
        if k != "1":
            rows.append([[tag("strong", f"Top {k}"), tag("span", f"the reference is among the {k} most probable labels",
                                                         class_="quiet block")],
                         f"{share:.3f}", "–", interval_bar(share, None, {}), *["–" for _ in baselines]])
    majority = found.baselines.get("majority", {}).get("label")
    said: list[Child] = [
        f"{found.n:,} rows of {found.folder.name}/predictions.csv. Intervals: 95%, bootstrap over rows; they say nothing "
            "of notes of another kind or another training run. "]
    if few := said_of_few_rows(found.n):
        said.append(f"{few}. ")
    guesses_said = [f"{name} ({BASELINES[name]})" for name in baselines if name in BASELINES]
    if guesses_said:
        said += ["Beside it what an answer scores that knows nothing of the note: " + " and ".join(guesses_said),
                 ["; here “", tag("bdi", str(majority)), "”"] if majority else None, "."]
    said += said_of_rows(found.held)
    if found.right.all():
        said.append(f" Of {found.n:,} right answers out of {found.n:,} the true rate may still be as low as "
                    f"{max(0.0, 1 - 3 / found.n):.3f} (1 − 3/n), whatever the bootstrap says.")
    return tag("section", tag("h2", "Scores"), tag("p", said), _other_adapter(found, run),
               table(["", "score", "95% interval", "0 to 1", *baselines], rows, numbers=(1, 2, *range(4, 4 + len(baselines))),
                     class_="scores"))


def calibration_section(found: ScoreFiles) -> Markup:
    """Reliability, and what not answering gains."""
    head = tag("h2", "Can its probabilities be trusted?")
    if found.probability is None:
        return tag("section", head, tag("p", "Not every answer has a probability (answers written freely have none), so there "
                                             "is nothing to compare."))
    return tag("section", head, tag("div", _reliability(found.probability, found), _coverage(found.probability, found),
                                    class_="charts"))


def _reliability(probability: Floats, found: ScoreFiles) -> Markup:
    bins, right = reliability(probability, found.right), found.right
    error = calibration_error(probability, right)
    frame = Frame(linear_axis(0, 1, "probability that was given", percent=True),
                  linear_axis(0, 1, "share that was right", percent=True))
    filled = np.flatnonzero(bins.n)
    titles = [f"{percent(b / BINS, 0)} to {percent((b + 1) / BINS, 0)}: {bins.n[b]:,} rows, said "
              f"{percent(bins.probability[b])}, right {percent(bins.accuracy[b])}" for b in filled]
    marks: list[Child] = [frame.line(np.array([0.0, 1.0]), np.array([0.0, 1.0]), "bound")]
    for b in filled:
        marks.append(frame.line(np.repeat(bins.probability[b], 2), np.array([bins.probability[b], bins.accuracy[b]]), "gap"))
    for b, title in zip(filled, titles, strict=True):
        radius = float(3 + 6 * np.sqrt(bins.n[b] / bins.n.max()))
        marks.append(frame.dots(bins.probability[b : b + 1], bins.accuracy[b : b + 1], "main", [title], radius))
    mean, rate = float(probability.mean()), float(right.mean())
    word = "about as sure as it is right" if abs(mean - rate) < 0.02 else "too sure" if mean > rate else "not sure enough"
    said = (f"Expected calibration error {error:.3f}: the mean gap (upright lines) over {BINS} bins, weighted by rows (size of "
            f"the dots). On average it says {percent(mean)} and is right in {percent(rate)}: {word}. On the diagonal a "
            "probability means what it says.")
    return figure("Reliability", frame.draw("Share of right answers by given probability", *marks), said,
                  legend([("main-dots", f"{found.n:,} rows in {BINS} bins"), ("bound", "what it should be")]))


def _coverage(probability: Floats, found: ScoreFiles) -> Markup:
    curve = coverage(probability, found.right)
    low = float(curve.accuracy.min())
    frame = Frame(linear_axis(0, 1, "share of rows answered, the surest first", percent=True),
                  linear_axis(0 if low < 0.5 else 0.5 if low < 0.9 else 0.9, 1, "right among them", percent=True))
    marks: list[Child] = [frame.level(float(found.right.mean()), "bound", "all rows answered"),
                          frame.line(curve.share, curve.accuracy, "main")]
    points = picked(curve)
    digits = next((d for d in range(3, 9) if len({f"{curve.threshold[at]:.{d}f}" for at in points}) == len(points)), 9)
    rows: list[list[Child]] = [[f"≥ {curve.threshold[at]:.{digits}f}", percent(curve.share[at], 0), percent(curve.accuracy[at]),
                                f"{round(curve.share[at] * found.n * (1 - curve.accuracy[at])):,}"] for at in points]
    said = "Leaving the unsure rows to a person: an answer only from this probability on, and how often it is then right."
    return figure("Accuracy and coverage", frame.draw("Accuracy among the surest rows", *marks),
                  [said, table(["probability", "answered", "right", "errors"], rows, numbers=range(4), class_="dense")],
                  legend([("main", "right among those answered"), ("bound", "all answered")]))


def labels_section(found: ScoreFiles) -> Markup:
    """Every label that occurs among the references, the hardest first."""
    rates = label_scores(count_pairs(found.reference, found.prediction, np.zeros((len(found.names), 1))))
    known = sorted(np.unique(found.reference).tolist(), key=lambda code: (rates.f1[code], -rates.n[code], found.names[code]))
    rows: list[list[Child]] = []
    for code in known[:MOST_LABELS]:
        f1, cosine = float(rates.f1[code]), found.cosines.get(normalize_label(found.names[code]))
        rows.append([tag("span", shortened(found.names[code], 70), title=found.names[code]), f"{rates.n[code]:,.0f}",
                     f"{rates.predicted[code]:,.0f}", f"{rates.precision[code]:.2f}", f"{rates.recall[code]:.2f}", f"{f1:.2f}",
                     picture(90, 12, f"F1 {f1:.2f}", tag("rect", x=0, y=4, width=90, height=4, class_="track"),
                             tag("rect", x=0, y=4, width=90 * f1, height=4, class_="fill"), class_="bar small"),
                     "–" if cosine is None else f"{cosine:.2f}"])
    rough = sum(rates.n[code] < SMALL for code in known)
    said = f"{len(known):,} labels, the hardest " + (f"{MOST_LABELS}." if len(known) > MOST_LABELS else "first.")
    if rough:
        said += (f" {'All' if rough == len(known) else rough} of them have fewer than {SMALL} rows: one row more or less moves "
                 "their scores by several points.")
    return tag("section", tag("h2", "Label by label"), tag("p", said),
               table(["label", "rows", "answered", "precision", "recall", "F1", "", "cosine"], rows, numbers=(1, 2, 3, 4, 5, 7),
                     class_="dense labels"))
