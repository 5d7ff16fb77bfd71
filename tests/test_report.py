"""Promises of report.py and intervals.py."""
import json

import numpy as np
import pytest
from PIL import Image

from evaluate import eval_info
from intervals import (mcnemar_exact, over_seeds, paired_difference, stratified_bootstrap, summarize, wilson_interval)
from reflector import StopRule
from report import contact_sheet, fidelity_plots, fidelity_report, film_strip, learning_curves, results_table


def pairs(both, lost, won, neither):
    """Outcomes of two policies: solved by both, only by the first, only by the second, by none."""
    before = [True] * both + [True] * lost + [False] * won + [False] * neither
    after = [True] * both + [False] * lost + [True] * won + [False] * neither
    return np.array(before), np.array(after)


def test_wilson_interval_has_the_published_values_and_stays_a_probability():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson_interval(20, 20) == pytest.approx((0.8389, 1), abs=1e-4)
    for n in (1, 7, 1000):
        assert wilson_interval(0, n)[0] == 0 and 0 < wilson_interval(0, n)[1] < 1
        assert wilson_interval(n, n)[1] == 1 and 0 < wilson_interval(n, n)[0] < 1
    assert wilson_interval(0, 0) == (0, 1)


def test_mcnemar_counts_only_the_episodes_that_changed():
    assert mcnemar_exact(*pairs(0, 1, 9, 0)) == 0.021484375  # 2 * (1 + 10) / 2^10
    assert mcnemar_exact(*pairs(30, 9, 1, 12)) == 0.021484375
    assert mcnemar_exact(*pairs(5, 3, 3, 5)) == 1
    assert mcnemar_exact(*pairs(5, 0, 0, 5)) == 1
    assert mcnemar_exact(*pairs(0, 0, 5, 0)) == 2 / 32


def test_paired_difference_is_after_minus_before_and_has_a_width_without_changes():
    difference, (low, high) = paired_difference(*pairs(20, 2, 12, 16))
    assert difference == pytest.approx(0.2) and 0 < low < 0.2 < high < 0.4
    reverse, (reverse_low, reverse_high) = paired_difference(*pairs(20, 12, 2, 16))
    assert (reverse, reverse_low, reverse_high) == pytest.approx((-0.2, -high, -low))
    same, (low, high) = paired_difference(*pairs(10, 0, 0, 0))
    assert same == 0 and -0.35 < low < -0.2 and 0.2 < high < 0.35
    assert paired_difference(*pairs(0, 0, 5, 0))[1][1] == 1


def test_paired_difference_has_newcombes_published_interval():
    # Newcombe 1998b, table: e, f, g, h = 36, 12, 2, 0 (n = 50), method 10
    difference, interval = paired_difference(*pairs(36, 2, 12, 0))
    assert difference == pytest.approx(0.2)
    assert interval == pytest.approx((0.0569, 0.3404), abs=1e-4)


def test_pairing_narrows_the_interval():
    wide = paired_difference(*pairs(12, 13, 13, 12))[1]
    narrow = paired_difference(*pairs(24, 1, 1, 24))[1]
    assert narrow[1] - narrow[0] < 0.6 * (wide[1] - wide[0])


@pytest.mark.parametrize("n, table", [
    (20, (0.3, 0.1, 0.3, 0.3)), (50, (0.5, 0.05, 0.1, 0.35)), (50, (0.9, 0.02, 0.05, 0.03))])
def test_paired_difference_covers_the_truth_about_95_times_in_100(n, table):
    rng = np.random.default_rng(0)
    truth, covered = table[2] - table[1], 0
    for _ in range(600):
        low, high = paired_difference(*pairs(*rng.multinomial(n, table)))[1]
        covered += low <= truth <= high
    assert 0.925 <= covered / 600 <= 0.995


def test_the_bootstrap_draws_seeds_within_every_task():
    apart = np.array([[0.0, 1.0], [1.0, 0.0]])  # each seed solves another task: both means are 0.5
    low, high = stratified_bootstrap(apart)
    assert (low, high) == (0.0, 1.0), "drawing whole seeds would always give 0.5"
    assert stratified_bootstrap(np.array([[0.2, 1.0], [0.2, 1.0]])) == pytest.approx((0.6, 0.6)), "tasks must not be resampled"
    rates = np.random.default_rng(0).normal(0.5, 0.1, (8, 10))
    low, high = stratified_bootstrap(rates)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(rates.var(0).sum() / 8) / 10, rel=0.05)
    assert stratified_bootstrap(rates) == (low, high)


def line(task, seed, reached, stopped, T=4):
    """An episode of T chunks of 8 steps whose goal holds from chunk `reached` on, scored high from `stopped` on."""
    chunks = np.arange(1, T + 1)
    done, score = chunks >= (reached or 99), (chunks >= (stopped or 99)).astype(float)
    return {"task_id": task, "seed": seed, "chunks": T, "steps": 8 * T, "oracle_stop": bool(done.any()),
            "steps_to_oracle_stop": 8 * reached if reached else 8 * T, "self_stop": bool(done[(stopped or T) - 1]),
            "steps_to_self_stop": 8 * (stopped or T), "success": done.astype(int).tolist(), "score": score.tolist(),
            "seconds": 2.0}


BEFORE = [line(0, 0, 2, 3), line(0, 1, None, None), line(7, 0, None, 2), line(7, 1, 3, None)]
AFTER = [line(0, 0, 2, 3), line(0, 1, 4, 4), line(7, 0, 1, 2), line(7, 1, None, None)]
RULE = StopRule(eta=0.5, confirm=1)


def test_the_summary_of_an_evaluation_counts_by_task_and_by_stop():
    results = summarize({"cloned": BEFORE, "post_trained": AFTER}, RULE)
    assert results["policies"]["cloned"]["oracle_stop"] == rate(2, 4) | {"ci95": list(wilson_interval(2, 4))}
    assert [results["per_task"]["post_trained"][task]["oracle_stop"]["successes"] for task in ("0", "7")] == [2, 1]
    pair = results["paired"]["post_trained - cloned"]["oracle_stop"]
    assert pair["difference"] == 0.25 and pair["mcnemar_p"] == mcnemar_exact([1, 0, 0, 1], [1, 1, 1, 0])
    assert results["lengths"]["cloned"]["steps_to_oracle_stop"] == {"mean": 26.0, "median": 28.0, "max": 32}
    judged = results["reflector_here"]["cloned"]  # frames 3 and 4 of the first are right, 2 to 4 of the third are not
    assert (judged["precision"], judged["recall"]) == (2 / 5, 2 / 5)
    assert (judged["false_stop_rate"], judged["missed_rate"], judged["stop_delay"]) == (1 / 4, 1 / 2, 1.0)
    text = results_table({"task": "t", "preset": "p", "seed": 0, "instructions": {"7": "close the drawer"},
                          "protocol": {"step limit": 280}, **results})
    for row in ("| 7 close the drawer | 1/2 = **50%**", "mean 26.0, median 28, max 32", "| step limit | 280 |",
                "| false stop rate | 0.25 | 0 |", "| difference | **+25 points**"):
        assert row in text, row


def test_one_stop_tells_nothing_of_the_other():
    results = summarize({"cloned": BEFORE}, RULE, "oracle")
    assert set(results["policies"]["cloned"]) == {"oracle_stop"} and "reflector_here" not in results
    assert "| cloned | 2/4 = **50%** (15% to 85%) | – | – |" in results_table({"task": "t", "preset": "p", "seed": 0, **results})


def test_self_stop_is_paired_with_episodes_that_nothing_stops():
    def lost(row):  # a goal that no longer holds at the limit
        return row | {"no_stop": False, "steps_to_no_stop": 8 * row["chunks"]}
    lines = {name: [lost(row) for row in rows[:3]] for name, rows in (("cloned", BEFORE), ("post_trained", AFTER))}
    results = summarize(lines, RULE, "none")
    assert results["policies"]["cloned"]["no_stop"]["successes"] == 0
    found = {(pair["never"], pair["self"]): round(3 * pair["difference"]) for pair in results["stopped"]}
    assert found == {("cloned", "cloned"): 1, ("post_trained", "post_trained"): 3, ("cloned", "post_trained"): 3}
    text = results_table({"task": "t", "preset": "p", "seed": 0, **results})
    assert "| policy | oracle stop | self stop | never stopped | imagined |" in text
    assert "| never stopped | self stop | difference |" in text and "| cloned | post-trained | **+100 points**" in text


def test_several_seeds_give_a_mean_a_deviation_and_an_interval():
    lines = {"a": {"cloned": BEFORE, "post_trained": AFTER}, "b": {"cloned": BEFORE, "post_trained": BEFORE}}
    results = over_seeds(lines, "oracle")
    assert results["post_trained"]["oracle_stop"]["rates"] == [0.75, 0.5]
    assert results["post_trained"]["oracle_stop"]["std"] == pytest.approx(0.25 / np.sqrt(2))
    assert results["difference"]["oracle_stop"]["mean"] == 0.125 and results["cloned"]["oracle_stop"]["std"] == 0
    text = results_table({"task": "t", "preset": "p", "seed": "0, 1", "policies": {}, "over_seeds": results})
    assert "| post-trained | **62.5%** ± 17.7% (50.0% to 75.0%); 75%, 50% | – |" in text
    pairs = results["difference"]["oracle_stop"]["pairs"]  # two won, one lost in a; none in b
    assert pairs["difference"] == 0.125 and pairs["mcnemar_p"] == mcnemar_exact([0, 0, 1], [1, 1, 0])
    assert "; 25%, 0%; pairs: **+12 points**" in text


def test_eval_info_has_lerobots_names():
    info = eval_info(BEFORE, "libero_goal", "both", {7: ["a.gif"]})
    assert info["overall"] == {"avg_sum_reward": 0.5, "avg_max_reward": 0.5, "pc_success": 50.0, "n_episodes": 4, "eval_s": 8.0,
                               "eval_ep_s": 2.0, "video_paths": ["a.gif"]}
    assert [task["task_id"] for task in info["per_task"]] == [0, 7] and info["per_task"][1]["task_group"] == "libero_goal"
    assert info["per_task"][1]["metrics"]["successes"] == [False, True] and json.dumps(info)
    assert eval_info([line(0, 0, 3, 2)], "libero_goal", "self", {})["overall"]["pc_success"] == 0.0  # it stops too early


def rate(successes, episodes):
    return {"successes": successes, "episodes": episodes, "rate": successes / episodes,
            "ci95": wilson_interval(successes, episodes)}


RESULTS = {
    "task": "libero_object", "preset": "small", "seed": 3,
    "policies": {"cloned": {"oracle_stop": rate(27, 50), "self_stop": rate(22, 50)},
                 "post_trained": {"oracle_stop": rate(31, 50), "self_stop": rate(26, 50)}},
    "paired": {"post_trained - cloned": {"oracle_stop": {"difference": 0.08, "ci95": [-0.03, 0.19], "mcnemar_p": 0.289},
                                         "self_stop": {"difference": 0.08, "ci95": [-0.04, 0.20], "mcnemar_p": 0.344}}},
    "imagined": {"cloned": rate(200, 512), "post_trained": rate(340, 512)},
    "stages": {"demonstrate": 400.3, "clone": 3725, "evaluate": 33},
    "control_steps": {"demonstrate": {"true": 6000}, "imagine": {"true": 0, "imagined": 120_000}, "evaluate": {"true": 5000}},
    "world_model": {"psnr_wrist_5_predicted": 24.12, "psnr_wrist_5_still": 20.0,
                    "psnr_wrist_5_shuffled": 17.0, "state_mm_1": 4.2, "episodes": 30},
    "reflector": {world: {"auroc": value, "stop_delay": None, "outcome": {"false_success": {"rate": 0.25}}}
                  for world, value in (("true", 0.971), ("imagined", 0.9))},
    "videos": "runs/libero_object/videos",
}


def test_the_table_puts_both_worlds_and_both_stops_side_by_side():
    lines = results_table(RESULTS).splitlines()
    assert "libero_object" in lines[0] and "small" in lines[0] and "seed 3" in lines[0]
    text = "\n".join(lines)
    cloned, trained, difference = [next(line for line in lines if line.startswith(start))
                                   for start in ("| cloned", "| post-trained", "| difference")]
    for cell in ("27/50 = **54%** (40% to 67%)", "22/50 = **44%**", "200/512 = **39%**"):
        assert cell in cloned
    for cell in ("31/50 = **62%**", "26/50 = **52%**", "340/512 = **66%**"):
        assert cell in trained
    for cell in ("+8 points** (-3 to +19), p = 0.29", "+8 points** (-4 to +20), p = 0.34"):
        assert cell in difference
    for row in ("| PSNR (dB), wrist, after 5 chunks | 24.1 | 20 | 17 |",
                "| gripper position error (mm), after 1 chunk | 4.2 |  |  |", "| false success | 25% | 25% |",
                "| auroc | 0.971 | 0.9 | success against", "| stop delay | – | – |", "runs/libero_object/videos",
                "| clone | 1 h 2 min | 0 | 0 |", "| demonstrate | 6 min 40 s | 6,000 | 0 |",
                "| evaluate | 33 s | 5,000 | 0 |", "| **1 h 9 min** | **11,000** | **120,000** |"):
        assert row in text
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables} == {5}


def test_the_table_of_one_policy_alone_leaves_the_rest_out():
    text = results_table({"task": "t", "preset": "tiny", "seed": 0,
                          "policies": {"cloned": {"oracle_stop": rate(1, 2)}}})
    assert "| cloned | 1/2 = **50%** (9% to 91%) | – | – |" in text
    assert "post-trained" not in text and "| difference" not in text and "## Time" not in text


MEASURED = {
    "episodes": 100, "failures": 48, "reflector": RESULTS["reflector"],
    "outcome": {world: {"false_success": {"count": 2, "of": 48, "rate": 2 / 48, "ci95": [0.01, 0.14]}}
                for world in ("imagined frames", "true frames", "closed loop")},
    "closed_loop": {"hand_apart_mm_5": 4.2},
    "stability": {"not_unanimous": 0.03}, "violations": {"violating_steps": 0.125}, "following": {"gripper_px_5_true": 0.5},
    "horizon": {f"{unit}_wrist_{h}_{kind}": 20.0 - h for unit in ("psnr", "ssim", "feature") for h in (1, 5)
                for kind in ("predicted", "still", "shuffled", "nearest")},
}


def test_the_fidelity_report_says_how_far_the_imagination_can_be_believed(tmp_path):
    text = fidelity_report(MEASURED)
    for row in ("100 test episodes, 48 of them failures", "| false success, imagined frames | 2/48 = 4% (1% to 14%) |",
                "| not unanimous | 0.03 |", "| hand apart mm 5 | 4.2 |", "| violating steps | 0.125 |",
                "| gripper px 5 true | 0.5 |",
                "| SSIM, wrist, after 5 chunks | 15 | 15 | 15 | 15 |"):
        assert row in text, row
    fidelity_plots(tmp_path / "a.png", MEASURED)
    drawn = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    colour = np.ptp(drawn, axis=2) > 60
    assert drawn.shape == (770, 1540, 3) and colour[385:, :1100].any() and not colour[385:, 1160:].any()


LONG = "pick up the black bowl in the top drawer of the wooden cabinet and place it on the plate"


def rollouts(T=11):
    rng = np.random.default_rng(0)
    true, imagined = rng.integers(0, 255, (2, T, 2, 64, 64, 3), dtype=np.uint8)
    true[..., 0], imagined[..., 2] = 255, 255  # true is red, imagined is blue
    return true, imagined, np.linspace(0, 0.4, T), np.linspace(0, 1, T)


def test_film_strip_is_a_gif_with_every_frame_true_above_imagined(tmp_path):
    film_strip(tmp_path / "a.gif", *rollouts(), "pick up the milk", True)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 11 and film.size == (92 + 2 * 198, 44 + 2 * 218)
        pages = []
        for t in range(11):
            film.seek(t)
            pages.append(np.asarray(film.convert("RGB")).astype(int))
            assert film.info["duration"] == (2500 if t == 10 else 400)
    above, below = pages[10][44:236, 92:284].mean((0, 1)), pages[10][262:454, 92:284].mean((0, 1))
    assert above[0] > 200 > above[2] and below[2] > 200 > below[0]
    bar_true, bar_imagined = pages[10][246, 100], pages[10][464, 100]
    assert bar_true[2] > bar_true[1] and bar_imagined[1] > bar_imagined[2]  # blue goes on, green stops
    assert (pages[0] != pages[1]).any()


def test_contact_sheet_shows_first_and_last_frame_of_both_views(tmp_path):
    true, imagined, low, high = rollouts()
    true[0], true[-1], true[-1, 1], imagined[-1, 1] = 0, 255, 128, 30
    contact_sheet(tmp_path / "a.png", true, imagined, low, high, LONG, False)
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert sheet.shape == (64 + 2 * 302 + 16, 92 + 8 * 134, 3)
    last = 92 + 7 * 134
    assert (sheet[64:192, 92:220] == 0).all() and (sheet[64:192, last:last + 128] == 255).all()
    assert (sheet[198:326, last:last + 128] == 128).all() and (sheet[500:628, last:last + 128] == 30).all()


def test_the_longest_instruction_fits_above_the_pictures(tmp_path):
    film_strip(tmp_path / "a.gif", *rollouts(T=2), LONG, True)
    page = np.asarray(Image.open(tmp_path / "a.gif").convert("L"))
    assert page[:22].min() < 100 and (page[:22, -7:] > 250).all()


def test_contact_sheet_takes_a_short_rollout_and_missing_scores(tmp_path):
    true, imagined, low, _ = rollouts(T=1)
    contact_sheet(tmp_path / "a.png", true, imagined, low, np.full(1, np.nan), "title", True)
    film_strip(tmp_path / "a.gif", true, imagined, low, np.full(1, np.nan), "title", True)
    film_strip(tmp_path / "b.gif", true, None, low, None, "no imagination", True)
    contact_sheet(tmp_path / "b.png", true, None, low, None, "no imagination", True)
    assert Image.open(tmp_path / "b.gif").height == 44 + 218 and Image.open(tmp_path / "b.png").height == 64 + 302 + 16
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert sheet.shape[1] == 92 + 134
    assert sheet[328:344, 92:].min() < 250 and sheet[628:648, 92:].min() > 250  # a bar above, none below


def test_learning_curves_draw_what_was_logged(tmp_path):
    learning_curves(tmp_path / "empty.png", {})
    learning_curves(tmp_path / "clone.png", {("clone", step): {"l1": 1 / step} for step in range(1, 50)})
    empty, clone = [np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int) for name in ("empty", "clone")]
    assert empty.shape == clone.shape == (935, 1320, 3)
    blue = [picture[..., 2] - picture[..., 0] > 100 for picture in (empty, clone)]
    assert not blue[0].any() and blue[1][:340, :500].sum() > 500  # a curve in the first panel ...
    assert not blue[1][:, 500:].any() and not blue[1][340:].any()  # ... and in no other
