"""Promises of report.py."""
import json

import numpy as np
import pytest
from PIL import Image

from report import (fidelity_plots, fidelity_report, contact_sheet, film_strip, learning_curves, mcnemar_exact, paired_difference,
                    results_table, wilson_interval)


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


def rate(successes, episodes):
    return {"successes": successes, "episodes": episodes, "rate": successes / episodes,
            "ci95": wilson_interval(successes, episodes)}


RESULTS = {
    "task": "libero_object", "preset": "small", "seed": 3,
    "policies": {"cloned": {"oracle_stop": rate(27, 50), "self_stop": rate(22, 50)},
                 "post_trained": {"oracle_stop": rate(31, 50), "self_stop": rate(26, 50)}},
    "paired": {"oracle_stop": {"difference": 0.08, "ci95": [-0.03, 0.19], "mcnemar_p": 0.289},
               "self_stop": {"difference": 0.08, "ci95": [-0.04, 0.20], "mcnemar_p": 0.344}},
    "imagined": {"cloned": rate(200, 512), "post_trained": rate(340, 512)},
    "stages": {"demonstrate": 400.3, "clone": 3725, "evaluate": 33},
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
                "| clone | 1 h 2 min |",
                "| demonstrate | 6 min 40 s |", "| evaluate | 33 s |"):
        assert row in text
    assert "**1 h 9 min**" in text
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables} == {5, 3}


def test_the_table_of_one_policy_alone_leaves_the_rest_out():
    text = results_table({"task": "t", "preset": "tiny", "seed": 0,
                          "policies": {"cloned": {"oracle_stop": rate(1, 2)}}})
    assert "| cloned | 1/2 = **50%** (9% to 91%) | – | – |" in text
    assert "post-trained" not in text and "| difference" not in text and "## Time" not in text


MEASURED = {
    "episodes": 100, "failures": 48, "reflector": RESULTS["reflector"],
    "outcome": {world: {"false_success": {"count": 2, "of": 48, "rate": 2 / 48, "ci95": [0.01, 0.14]}}
                for world in ("imagined", "true")},
    "stability": {"not_unanimous": 0.03}, "violations": {"violating_steps": 0.125}, "following": {"gripper_px_5_true": 0.5},
    "horizon": {f"{unit}_wrist_{h}_{kind}": 20.0 - h for unit in ("psnr", "ssim", "feature") for h in (1, 5)
                for kind in ("predicted", "still", "shuffled", "nearest")},
}


def test_the_fidelity_report_says_how_far_the_imagination_can_be_believed(tmp_path):
    text = fidelity_report(MEASURED)
    for row in ("100 test episodes, 48 of them failures", "| false success on imagined frames | 2/48 = 4% (1% to 14%) |",
                "| not unanimous | 0.03 |", "| violating steps | 0.125 |", "| gripper px 5 true | 0.5 |",
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
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert sheet.shape[1] == 92 + 134
    assert sheet[328:344, 92:].min() < 250 and sheet[628:648, 92:].min() > 250  # a bar above, none below


def test_learning_curves_draw_what_was_logged_and_survive_a_torn_log(tmp_path):
    learning_curves(tmp_path / "empty.png", tmp_path / "missing.jsonl")
    lines = [json.dumps({"stage": "clone", "step": step, "l1": 1 / step}) for step in range(1, 50)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"stage": "clone", "st')
    learning_curves(tmp_path / "clone.png", tmp_path / "log.jsonl")
    (tmp_path / "again.jsonl").write_text('{"stage": "clone", "step": 7, "l1": 99}\n' + "\n".join(lines))
    learning_curves(tmp_path / "again.png", tmp_path / "again.jsonl")
    empty, clone, again = [np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
                           for name in ("empty", "clone", "again")]
    assert empty.shape == clone.shape == (935, 1320, 3)
    blue = [picture[..., 2] - picture[..., 0] > 100 for picture in (empty, clone)]
    assert not blue[0].any() and blue[1][:340, :500].sum() > 500  # a curve in the first panel ...
    assert not blue[1][:, 500:].any() and not blue[1][340:].any()  # ... and in no other
    assert (clone == again).all()  # the later line of step 7 wins
