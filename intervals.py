"""Success rates with honest intervals: one policy, two policies on the same initial states, several seeds.

- `wilson_interval`       95 % score interval of a success rate (Wilson 1927); inside [0, 1] even at 0/n and n/n.
- `mcnemar_exact`         exact two-sided p-value of "both are equally good": among the episodes that only one of
                          them solved, how likely is a split this uneven with a fair coin?
- `paired_difference`     95 % interval of the difference of the two rates: Newcombe's hybrid score interval for
                          paired proportions (Statistics in Medicine 17:2635, 1998, method 10). It joins the two
                          Wilson intervals by the outcomes' correlation, and unlike Wald's has a width at 0/n.
- `stratified_bootstrap`  95 % interval of a mean over seeds (Agarwal et al., NeurIPS 2021, "rliable"): seeds are drawn
                          with replacement, in every task anew. It holds for a NEW seed; Wilson's for these weights.
`summarize` puts them together from the lines of `playing.play`. All without scipy.

Try it:  python -m pytest tests/test_report.py
"""
from __future__ import annotations

import math
from itertools import combinations

import numpy as np

from reflector import StopRule, reflector_metrics

Z = 1.959964  # 97.5 % quantile of the normal distribution
STOPS = {"oracle": ("oracle_stop",), "self": ("self_stop",), "both": ("oracle_stop", "self_stop"),
         "none": ("oracle_stop", "self_stop", "no_stop")}  # --stop: what it tells


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """95 % interval of a success rate; (0, 1) when there are no episodes."""
    if episodes == 0:
        return 0.0, 1.0
    rate, z2 = successes / episodes, Z * Z / episodes
    middle = (rate + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(rate * (1 - rate) / episodes + z2 / episodes / 4) / (1 + z2)
    return (middle - half if successes else 0.0), (middle + half if successes < episodes else 1.0)


def mcnemar_exact(before, after) -> float:
    """Two-sided p-value for paired outcomes (n,) bool; 1 when no episode changed."""
    before, after = np.asarray(before, bool), np.asarray(after, bool)
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    changed = lost + won
    tail = sum(math.comb(changed, k) for k in range(min(lost, won) + 1)) / 2**changed
    return min(1.0, 2 * tail)


def paired_difference(before, after) -> tuple[float, tuple[float, float]]:
    """rate(after) - rate(before) and its 95 % interval (Newcombe's method 10); outcomes (n,) bool."""
    before, after = np.asarray(before, bool), np.asarray(after, bool)
    n = len(before)
    if n == 0:
        return 0.0, (-1.0, 1.0)
    both, neither = int((before & after).sum()), int((~before & ~after).sum())
    b, a = int(before.sum()), int(after.sum())
    covariance = both * neither - (a - both) * (b - both)
    if covariance > 0:
        covariance = max(0.0, covariance - n / 2)  # Newcombe's continuity correction
    spread = math.sqrt(b * (n - b) * a * (n - a))
    phi = covariance / spread if spread else 0.0
    (low_b, high_b), (low_a, high_a) = wilson_interval(b, n), wilson_interval(a, n)
    difference = (a - b) / n
    below = _hypotenuse(a / n - low_a, high_b - b / n, phi)
    above = _hypotenuse(high_a - a / n, b / n - low_b, phi)
    return difference, (max(-1.0, difference - below), min(1.0, difference + above))


def _hypotenuse(x, y, correlation):
    return math.sqrt(max(0.0, x * x - 2 * correlation * x * y + y * y))


def stratified_bootstrap(rates, resamples=10_000, seed=0) -> tuple[float, float]:
    """95 % interval of the mean of rates (S seeds, M tasks): in every task S seeds are drawn with replacement."""
    rates, generator = np.asarray(rates, float), np.random.default_rng(seed)
    S, M = rates.shape
    means = [rates[generator.integers(S, size=(S, M)), np.arange(M)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


# ---------------------------------------------------------------------------------------------------------------------
# From episodes to results
# ---------------------------------------------------------------------------------------------------------------------
def proportion(values) -> dict:
    successes, episodes = int(np.sum(values)), len(values)
    return {"successes": successes, "episodes": episodes, "rate": successes / episodes,
            "ci95": list(wilson_interval(successes, episodes))}


def summarize(lines: dict[str, list[dict]], rule: StopRule, stop="both", pairs=None) -> dict:
    """Every number of an evaluation from {policy: lines of `play`}, all on the same states in the same order.

    policies: success rates; per_task; lengths; reflector_here: `reflector_metrics` of these episodes; paired: for every
    (before, after) in `pairs` (default: all) the test and the difference; stopped (--stop none): the same for self stop
    of `after` against no stop of `before`, and of a policy against itself.
    """
    stops = STOPS[stop]
    results = {"policies": {name: {key: proportion([line[key] for line in rows]) for key in stops}
                            for name, rows in lines.items()},
               "per_task": {name: {str(task): {key: proportion([line[key] for line in rows if line["task_id"] == task])
                                               for key in stops} for task in sorted({line["task_id"] for line in rows})}
                            for name, rows in lines.items()},
               "lengths": {name: lengths(rows, stops) for name, rows in lines.items()}, "paired": {}}
    if stop != "oracle":
        results["reflector_here"] = {name: reflector_here(rows, rule) for name, rows in lines.items()}
    pairs = list(combinations(lines, 2) if pairs is None else pairs)
    for before, after in pairs:
        results["paired"][f"{after} - {before}"] = {
            key: paired([line[key] for line in lines[before]], [line[key] for line in lines[after]]) for key in stops}
    if "no_stop" in stops:
        results["stopped"] = [{"never": before, "self": after, **paired([line["no_stop"] for line in lines[before]],
                                                                        [line["self_stop"] for line in lines[after]])}
                              for before, after in [*((name, name) for name in lines), *pairs]]
    return results


def paired(before, after) -> dict:
    difference, interval = paired_difference(before, after)
    return {"difference": difference, "ci95": list(interval), "mcnemar_p": mcnemar_exact(before, after)}


def lengths(rows, stops) -> dict:
    """Control steps of an episode until the first success or the limit, until the reflector's stop or the limit; chunks."""
    columns = {"steps": [line["steps"] for line in rows], "chunks": [line["chunks"] for line in rows]}
    for key in stops:
        columns[f"steps_to_{key}"] = [line[f"steps_to_{key}"] for line in rows]
    return {name: {"mean": float(np.mean(values)), "median": float(np.median(values)), "max": int(max(values))}
            for name, values in columns.items()}


def reflector_here(rows, rule) -> dict:
    """The reflector on the frames of these episodes, which were chosen by neither training nor calibration."""
    T = max(line["chunks"] for line in rows)
    score, label, valid = np.zeros((len(rows), T)), np.zeros((len(rows), T)), np.zeros((len(rows), T), bool)
    for row, line in enumerate(rows):
        count = line["chunks"]
        score[row, :count], label[row, :count], valid[row, :count] = line["score"], line["success"], True
    return reflector_metrics(score, label, valid, rule)


def over_seeds(lines: dict[str, dict[str, list[dict]]], stop="both") -> dict:
    """{run: {policy: lines}} of runs that differ by their seed alone -> {policy: {stop: mean, std, interval, rates}}.

    "difference": post-trained less cloned, run by run, and "pairs": the episodes of all runs together, as `paired` has them.
    std: over seeds, with S - 1.
    """
    names = [name for name in next(iter(lines.values())) if all(name in run for run in lines.values())]
    results = {}
    for key in STOPS[stop]:
        rates = {name: np.array([task_rates(run[name], key) for run in lines.values()]) for name in names}  # (S, M) each
        if {"cloned", "post_trained"} <= rates.keys():
            rates["difference"] = rates["post_trained"] - rates["cloned"]
        for name, values in rates.items():
            each = values.mean(1)  # (S,)
            results.setdefault(name, {})[key] = {
                "mean": float(each.mean()), "std": float(each.std(ddof=1)), "ci95": list(stratified_bootstrap(values)),
                "rates": each.tolist()}
        if "difference" in rates:
            results["difference"][key]["pairs"] = paired(*([line[key] for run in lines.values() for line in run[name]]
                                                           for name in ("cloned", "post_trained")))
    return results


def task_rates(rows, key) -> list[float]:
    """The success rate of every task, in their order."""
    return [float(np.mean([line[key] for line in rows if line["task_id"] == task]))
            for task in sorted({line["task_id"] for line in rows})]
