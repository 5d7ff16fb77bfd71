"""What a run leaves for a reader: report.md, videos and learning curves. The numbers' intervals come from intervals.py.

Pictures: `film_strip` (GIF) and `contact_sheet` (PNG) show a true rollout above the imagined one of the same
actions, with the reflector's score under every frame; `learning_curves` (PNG) draws what the stages logged.

Shapes: T frames at chunk boundaries, V views, H,W pixels; images are channels-last uint8.

Try it:  python -m pytest tests/test_report.py
"""
from __future__ import annotations

import math
import re

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from runs import read_json, read_log, write_json

# ----------------------------------------------------------------------------------------------------------
# report.md
# ----------------------------------------------------------------------------------------------------------
POLICIES = {"cloned": "cloned", "post_trained": "post-trained"}
CAPTION = """Successes / episodes, with 95% Wilson intervals. *Oracle stop*: the simulator ends the
episode at the first success. *Self stop*: the reflector ends it, and success is judged there. *Never stopped*: the policy
goes on to the step limit, and success is judged there (`--stop none`).
*Imagined*: the verdict of the reflector on rollouts in the world simulator; a gain there counts only if
the true columns show it too. *Difference*: same initial states, with Newcombe's paired 95% interval and
the exact McNemar p-value."""
SEEDS = """Mean and standard deviation over seeds (run folders), with the stratified bootstrap's 95% interval: in every
task seeds are drawn with replacement. *Difference*: post-trained less cloned, seed by seed; then all episodes as
pairs, with Newcombe's interval and McNemar's p, which speak of these policies and not of new seeds."""
LENGTHS = """Until the stop or the step limit, in control steps (50 ms)."""
MEANING = {  # what the reflector's numbers mean
    "auroc": "success against failure frames; chance 0.5, goal 0.95",
    "false_stop_rate": "episodes it would have stopped before the task was done",
    "missed_rate": "solved episodes it never stopped",
    "stop_delay": "chunks from success to the stop",
    "brier": "mean squared error of the probability",
    "ece": "calibration error of the probability",
}


def write_run(run, config, control_steps: dict):
    """results.json, report.md and the learning curves, from what the stages left; print the report."""
    held_out = {name: read_json(run.path(stage) / "held_out.json") for name, stage in
                (("world_model", "simulate"), ("reflector", "reflect"))}
    about = {name: getattr(config, name) for name in ("task", "preset", "seed")}
    results = about | read_json(run.path("evaluate") / "results.json") | held_out | {
        "videos": str(run.path("evaluate") / "videos"), "stages": run.seconds(), "control_steps": control_steps}
    write_json(run.folder / "results.json", results)
    learning_curves(run.folder / "curves.png", read_log(run.folder))
    text = results_table(results)
    (run.folder / "report.md").write_text(text + "\n")
    print(f"\n{text}\n\nWritten to {run.folder}: report.md, results.json, curves.png, evaluate/videos/")


def results_table(results: dict) -> str:
    """results.json -> Markdown. A part that is missing in `results` is left out.

    task, preset, seed; policies{cloned, post_trained, ...}{oracle_stop, self_stop, no_stop}{successes, episodes, rate,
    ci95}; paired{"after - before"}{as there}{difference, ci95, mcnemar_p}; imagined{cloned,
    post_trained}{as in policies}; stages{name: seconds}; control_steps{name: {true, imagined}};
    reflector, world_model: their metrics; videos: their folder; protocol{name: value};
    per_task, lengths, reflector_here, stopped: see `intervals.summarize`; over_seeds: see there.
    """
    parts = [f"# {results['task']} · preset {results['preset']} · seed {results['seed']}",
             "## Success rate", _success_table(results), CAPTION]
    if results.get("over_seeds"):
        parts += ["## Over seeds", _seeds_table(results["over_seeds"]), SEEDS]
    if results.get("per_task"):
        parts += ["## Tasks", _task_table(results["per_task"], results.get("instructions", {}))]
    if results.get("lengths"):
        parts += ["## Length of an episode", _length_table(results["lengths"]), LENGTHS]
    if results.get("reflector_here"):
        parts += ["## Reflector: these episodes", _reflector_table(results["reflector_here"])]
    if results.get("protocol"):
        rows = [[name, str(value)] for name, value in results["protocol"].items()]
        parts += ["## Protocol", _markdown(["", "value"], rows)]
    if results.get("world_model"):
        parts += ["## World simulator: open loop, held-out episodes", _fidelity_table(results["world_model"])]
    if results.get("reflector"):
        parts += ["## Reflector: held-out episodes, true and as the simulator imagines them",
                  _reflector_table(results["reflector"])]
    if "videos" in results:
        parts += ["## Videos", f"In `{results['videos']}`: true above, imagined (same actions) below."]
    if results.get("stages"):
        parts += ["## Cost", _cost_table(results["stages"], results.get("control_steps", {}))]
    return "\n\n".join(parts) + "\n"


def _cost_table(seconds, steps) -> str:
    worlds = ("true", "imagined") if steps else ()
    rows = [[stage, duration(time), *(f"{steps.get(stage, {}).get(world, 0):,}" for world in worlds)]
            for stage, time in seconds.items()]
    total = [f"{sum(values.get(world, 0) for values in steps.values()):,}" for world in worlds]
    rows.append(["**all**", *(f"**{value}**" for value in [duration(sum(seconds.values())), *total])])
    names = {"true": "true control steps", "imagined": "control steps imagined in RL"}
    return _markdown(["stage", "time", *(names[world] for world in worlds)], rows)


def _success_table(results) -> str:
    columns = _columns(results["policies"])
    rows = [[name_of(key)] + [_rate(cell) for cell in [*(cells.get(column) for column in columns),
                                                       results.get("imagined", {}).get(key)]]
            for key, cells in results["policies"].items()]
    for key, cells in results.get("paired", {}).items():
        name = "difference" + f", {key}" * (len(results["paired"]) > 1)
        rows.append([name, *(_difference(cells.get(column)) for column in columns), ""])
    table = _markdown(["policy", *columns.values(), "imagined"], rows)
    if not results.get("stopped"):
        return table
    rows = [[name_of(pair["never"]), name_of(pair["self"]), _difference(pair)] for pair in results["stopped"]]
    return table + "\n\n" + _markdown(["never stopped", "self stop", "difference"], rows)


COLUMNS = {"oracle_stop": "oracle stop", "self_stop": "self stop", "no_stop": "never stopped"}


def _columns(policies) -> dict:
    """Those of COLUMNS that a table has: oracle and self stop always."""
    told = any("no_stop" in cells for cells in policies.values())
    return {key: name for key, name in COLUMNS.items() if told or key != "no_stop"}


def name_of(key) -> str:
    """"runs/a/cloned" or "cloned" -> what a table calls it."""
    *run, policy = key.rsplit("/", 1)
    return ": ".join([*run, POLICIES.get(policy, policy)])


def _task_table(per_task, instructions) -> str:
    columns = [(policy, stop) for policy, tasks in per_task.items() for stop in next(iter(tasks.values()))]
    rows = [[f"{task} {instructions.get(task, '')}".strip(),
             *(_rate(per_task[policy][task][stop]) for policy, stop in columns)] for task in next(iter(per_task.values()))]
    return _markdown(["task", *(f"{name_of(policy)}, {COLUMNS.get(stop, stop)}" for policy, stop in columns)], rows)


def _length_table(lengths) -> str:
    names = list(next(iter(lengths.values())))
    title = {"steps": "played", "chunks": "played, chunks", "steps_to_oracle_stop": "to the oracle stop",
             "steps_to_self_stop": "to the self stop", "steps_to_no_stop": "never stopped"}
    rows = [[name_of(policy), *("mean {mean:.1f}, median {median:.0f}, max {max}".format(**cells[name]) for name in names)]
            for policy, cells in lengths.items()]
    return _markdown(["policy", *(title[name] for name in names)], rows)


def _seeds_table(over_seeds) -> str:
    columns = _columns(over_seeds)
    rows = [[name_of(policy), *(_seeds(cells.get(column)) for column in columns)] for policy, cells in over_seeds.items()]
    return _markdown(["policy", *columns.values()], rows)


def _seeds(cell) -> str:
    if cell is None:
        return "–"
    low, high = cell["ci95"]
    each = ", ".join(f"{rate:.0%}" for rate in cell["rates"])
    pairs = f"; pairs: {_difference(cell['pairs'])}" if "pairs" in cell else ""
    return f"**{cell['mean']:.1%}** ± {cell['std']:.1%} ({low:.1%} to {high:.1%}); {each}{pairs}"


def fidelity_report(measured: dict) -> str:
    """fidelity.json -> Markdown."""
    rows = [[f"{name.replace('_', ' ')}, {world}", f"{cell['count']}/{cell['of']} = {_percent(cell['rate'])} "
             f"({cell['ci95'][0]:.0%} to {cell['ci95'][1]:.0%})"]
            for world, cells in measured["outcome"].items() for name, cell in cells.items()]
    rows += [[name.replace("_", " "), _number(value)] for part in ("closed_loop", "stability", "violations", "following")
             for name, value in measured[part].items()]
    return "\n\n".join([
        f"# The virtual environment on {measured['episodes']} test episodes, {measured['failures']} of them failures",
        "## Outcome, stability, physics", _markdown(["", "value"], rows),
        "## Reflector", _reflector_table(measured["reflector"]),
        "## Error by horizon", _fidelity_table(measured["horizon"])]) + "\n"


def _reflector_table(worlds) -> str:
    """{"true": metrics, "imagined": metrics}, or by policy, side by side; counts of episodes as rates."""
    first = next(iter(worlds.values()))
    rows = [[name.replace("_", " "), *(_number(metrics[name]) for metrics in worlds.values()), MEANING.get(name, "")]
            for name in first if name != "outcome"]
    for name in first.get("outcome", {}):
        rows.append([name.replace("_", " "), *(_percent(metrics["outcome"][name]["rate"]) for metrics in worlds.values()),
                     MEANING.get(name, "")])
    return _markdown(["", *(f"{world} frames" if world in ("true", "imagined") else name_of(world) for world in worlds),
                      "meaning"], rows)


def _percent(rate) -> str:
    return "–" if rate is None else f"{rate:.0%}"


KINDS = {"predicted": "world simulator", "still": "the last frame stays", "shuffled": "with another episode's actions",
         "nearest": "the nearest training episode"}
UNITS = {"psnr": "PSNR (dB)", "ssim": "SSIM", "feature": "feature distance",
         "state_mm": "gripper position error (mm)", "state_deg": "gripper rotation error (degrees)"}


def _fidelity_table(metrics) -> str:
    """{unit}_{view}_{chunks}_{kind} share a row, one column a kind; so do the state's errors, which have no kind."""
    rows, kinds = {}, [kind for kind in KINDS if any(key.endswith("_" + kind) for key in metrics)]
    for key, value in metrics.items():
        if match := re.fullmatch(rf"({'|'.join(UNITS)})(?:_(agentview|wrist))?_(\d+)(?:_(\w+))?", key):
            unit, view, chunks, kind = match.groups()
            name = f"{UNITS[unit]}{', ' + view if view else ''}, after {chunks} chunk{'s' * (chunks != '1')}"
            rows.setdefault(name, {})[kind or "predicted"] = _number(value)
    return _markdown(["", *(KINDS[kind] for kind in kinds)],
                     [[name, *(row.get(kind, "") for kind in kinds)] for name, row in rows.items()])


def fidelity_plots(path, measured: dict) -> None:
    """PSNR, SSIM and feature distance by horizon in both views, and outcome rates with their intervals, as a PNG."""
    figure = Figure(figsize=(14, 7), layout="constrained")
    units, views = ("psnr", "ssim", "feature"), ("agentview", "wrist")
    grid = figure.subplot_mosaic([[f"{view} {unit}" for unit in units] + ["verdicts"] for view in views])
    for view in views:
        for unit in units:
            axes = grid[f"{view} {unit}"]
            for kind, label in KINDS.items():
                points = sorted((int(match[1]), value) for key, value in measured["horizon"].items()
                                if (match := re.fullmatch(rf"{unit}_{view}_(\d+)_{kind}", key)))
                if points:
                    axes.plot(*zip(*points), marker="o", markersize=3, label=label)
            axes.set_title(f"{view}: {UNITS[unit]}", fontsize=11)
            axes.set_xlabel("chunks", fontsize=9)
            axes.grid(alpha=0.25)
    grid["wrist psnr"].legend(frameon=False, fontsize=8)
    axes, cells = grid["verdicts"], [(f"{world}\n{name.replace('_', ' ')}", cell)
                                     for world, rates in measured["outcome"].items() for name, cell in rates.items()]
    for place, (_, cell) in enumerate(cells):
        axes.plot(cell["ci95"], [-place, -place], color="black", linewidth=1)
        axes.plot([cell["rate"] or 0], [-place], marker="o", color="black")
    axes.set(yticks=[-n for n in range(len(cells))], yticklabels=[name for name, _ in cells], xlim=(0, 1))
    axes.set_title("verdicts", fontsize=11)
    for axes in grid.values():
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _rate(cell) -> str:
    if cell is None:
        return "–"
    low, high = cell["ci95"]
    return f"{cell['successes']}/{cell['episodes']} = **{cell['rate']:.0%}** ({low:.0%} to {high:.0%})"


def _difference(cell) -> str:
    if cell is None:
        return "–"
    change, low, high = (100 * value for value in [cell["difference"], *cell["ci95"]])
    return f"**{change:+.0f} points** ({low:+.0f} to {high:+.0f}), p = {cell['mcnemar_p']:.2g}"


def _markdown(header, rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """125 -> '2 min 5 s'."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# ----------------------------------------------------------------------------------------------------------
# Rollouts: true above, imagined below
# ----------------------------------------------------------------------------------------------------------
INK, GRAY, PALE, GREEN, ORANGE, BLUE = "#1b1b1b", "#666666", "#d9d9d9", "#2a9d4a", "#c9690a", "#3b6fb6"
BAR, GAP, MARGIN, TOP = 26, 6, 92, 44  # pixels: score line, space between tiles, labels on the left, title
VIEWS = ("agent view", "wrist")
_font = ImageFont.load_default  # Pillow's own font, scalable: nothing to install


def film_strip(path, true_frames, imagined_frames, scores_true, scores_imagined, title, success, eta=0.5,
               scale=3):
    """Write a GIF of T frames: the true rollout above the imagined one, views side by side, scores below.

    true_frames, imagined_frames (None: no such row): uint8 (T, V, H, W, 3); scores: (T,) in [0, 1], NaN where there is none;
    success: the true outcome; eta: the score at which the reflector stops.
    """
    T, V, H, W, _ = true_frames.shape
    tile, block, pages = scale * W + GAP, scale * H + BAR, []
    rows = _rows(true_frames, imagined_frames, scores_true, scores_imagined)
    for t in range(T):
        page, draw = _page(MARGIN + V * tile, TOP + len(rows) * block, title, success)
        draw.text((MARGIN + V * tile - GAP, 24), f"chunk {t} of {T - 1}", GRAY, _font(13), anchor="ra")
        for number, (name, frames, scores) in enumerate(rows):
            top = TOP + number * block
            draw.text((8, top + scale * H // 2 - 10), name, INK, _font(17))
            draw.text((8, top + scale * H + 3), "P(done)", INK, _font(13))
            for v in range(V):
                page.paste(_enlarged(frames[t, v], scale), (MARGIN + v * tile, top))
            _score_bar(draw, MARGIN, top + scale * H + 5, V * tile - GAP, float(scores[t]), eta)
        pages.append(page.quantize(256))
    pause = [400] * (T - 1) + [2500]  # milliseconds
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=pause, loop=0, optimize=False)


def contact_sheet(path, true_frames, imagined_frames, scores_true, scores_imagined, title, success, eta=0.5,
                  columns=8, scale=2):
    """Write a PNG of up to `columns` evenly spaced moments, first and last included; else as `film_strip`."""
    T, V, H, W, _ = true_frames.shape
    times = np.unique(np.linspace(0, T - 1, columns).round().astype(int))
    tile, block, top = scale * W + GAP, V * (scale * H + GAP) + BAR + 8, TOP + 20
    rows = _rows(true_frames, imagined_frames, scores_true, scores_imagined)
    page, draw = _page(MARGIN + len(times) * tile, top + len(rows) * block + 16, title, success)
    for name, frames, scores in rows:
        draw.text((8, top + 4), name, INK, _font(17))
        draw.text((8, top + block - BAR - 9), "P(done)", INK, _font(13))
        for v in range(V):
            draw.text((8, top + v * (scale * H + GAP) + scale * H // 2 - 8), VIEWS[v], GRAY, _font(13))
        for column, t in enumerate(times):
            left = MARGIN + column * tile
            if name == "true":
                draw.text((left, TOP), f"chunk {t}", GRAY, _font(13))
            for v in range(V):
                page.paste(_enlarged(frames[t, v], scale), (left, top + v * (scale * H + GAP)))
            _score_bar(draw, left, top + V * (scale * H + GAP) - 1, scale * W, float(scores[t]), eta)
        top += block
    caption = "same actions above and below; bar: reflector's score; line: stop threshold; green: above it"
    draw.text((MARGIN, top - 4), caption, GRAY, _font(13))
    page.save(path)


def _rows(true_frames, imagined_frames, scores_true, scores_imagined):
    rows = [("true", true_frames, scores_true), ("imagined", imagined_frames, scores_imagined)]
    return rows[:1] if imagined_frames is None else rows


def _page(width, height, title, success):
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    size = next(size for size in range(16, 7, -1) if size == 8 or _font(size).getlength(title) <= width - 16)
    draw.text((8, 4), title, INK, _font(size))
    outcome = "true outcome: success" if success else "true outcome: failure"
    draw.text((8, 24), outcome, GREEN if success else ORANGE, _font(13))
    return page, draw


def _score_bar(draw, left, top, width, score, eta):
    """A bar filled to the score, a line at eta, the number behind it; green where it stops the episode."""
    if math.isnan(score):
        return
    length, color = width - 36, GREEN if score > eta else BLUE
    draw.rectangle((left, top, left + length, top + 12), PALE)
    if score * length >= 1:
        draw.rectangle((left, top, left + round(length * score), top + 12), color)
    draw.line((left + length * eta, top - 2, left + length * eta, top + 14), INK, 1)
    draw.text((left + width, top - 1), f"{score:.2f}", INK, _font(13), anchor="ra")


def _enlarged(image, scale):
    picture = Image.fromarray(np.ascontiguousarray(image))
    return picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.BICUBIC)


# ----------------------------------------------------------------------------------------------------------
# Learning curves
# ----------------------------------------------------------------------------------------------------------
PANELS = [  # title, part in log.jsonl, metrics drawn in it
    ("clone: L1", "clone", ["l1"]),
    ("world simulator: loss", "simulate", ["loss"]),
    ("reflector", "reflect", ["loss", "accuracy"]),
    ("imagine: success and reward", "imagine", ["success_rate", "reward"]),
    ("imagine: chunks until the stop", "imagine", ["stop_chunk"]),
    ("imagine: approx_kl", "imagine", ["approx_kl"]),
    ("imagine: clipped, idle groups", "imagine", ["clip_frac", "groups_without_advantage"]),
    ("imagine: entropy", "imagine", ["entropy"]),
    ("validation in both worlds", "validate", ["true_success", "imagined_success"]),
]


def learning_curves(path, records) -> None:
    """Draw `runs.read_log` as a PNG of small panels; a panel without data says so."""
    figure = Figure(figsize=(12, 8.5), layout="constrained")  # no pyplot: no display, no state
    for axes, (title, part, names) in zip(figure.subplots(3, 3).flat, PANELS):
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        for name in names:
            points = sorted((step, record[name]) for (where, step), record in records.items()
                            if where == part and name in record)
            if points:
                axes.plot(*zip(*points), marker="o" if len(points) < 30 else "", markersize=3, label=name)
        if axes.lines:
            axes.grid(alpha=0.25)
            axes.set_xlabel("iteration" if part in ("imagine", "validate") else "step", fontsize=9)
        else:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "nothing logged", ha="center", color="gray", transform=axes.transAxes)
        if len(axes.lines) > 1:
            axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
