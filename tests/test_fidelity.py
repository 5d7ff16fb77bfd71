"""Promises of fidelity.py, on a world that knows the answer."""
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter

import evaluate
import fidelity
from episodes import ChunkData, Episode
from fidelity import (GripperProbe, agreement, check_trust, gripper_pixels, hand_apart, horizon_errors, imagine_episodes,
                      imagined_copies, open_loop, outcome_agreement, reflector_quality, ssim, stability, violations)
from geometry import Camera, Cameras
from reflector import StopRule
from runs import UserError
from world_model import WorldModelConfig

CAMERAS = Cameras(Camera(45.0, [0.9, 0.0, 0.65], [[0.0, -0.6, 0.8], [1.0, 0.0, 0.0], [0.0, 0.8, 0.6]]),
                  Camera(75.0, [0.05, 0.0, -0.097], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]), 0.0)
SIZE, L, ONE = 32, 4, StopRule(confirm=1)


class Mover(torch.nn.Module):
    """A world in which a chunk whose first action is a adds 10 a grey levels; `noise` > 0 adds its own."""

    def __init__(self, noise=0.0):
        super().__init__()
        self.config, self.cameras, self.noise = WorldModelConfig(image_size=SIZE, chunk_size=L, neighbours=0), CAMERAS, noise
        self.diffused = (6, SIZE, SIZE)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def predict_state(self, images, states, previous_actions, actions, uniform, task):
        state = states[:, 1]
        return torch.cat([state[:, :1] + 0.01 * actions[:, 0, :1], state[:, 1:]], dim=1)

    def sample(self, memory, memory_states, next_state, actions, noise, task, scene):
        change = 10 * actions[:, 0, 0].view(-1, 1, 1, 1, 1) + self.noise * noise.mean((1, 2, 3)).view(-1, 1, 1, 1, 1)
        return (memory[:, -1].float() + change).clamp(0, 255).to(torch.uint8)


class Bright:
    """Done where the frame is brighter than 100."""
    platt = None

    def parameters(self):
        return iter([torch.zeros(1)])

    def __call__(self, frames, instruction, fingers):
        return frames.float().mean((2, 3, 4, 5)) - 100

    def probability(self, logits):
        return torch.sigmoid(logits)

    def score(self, first, previous, current, instruction, fingers):
        return torch.sigmoid(current.float().mean((1, 2, 3, 4)) - 100)


def episode(moves, task=0, start=50):
    """True to `Mover`: chunk t adds 10 moves[t]; done above 100."""
    level = start + 10 * np.cumsum([0, *moves])
    actions = np.zeros((len(moves) * L, 7), np.float32)
    actions[::L, 0] = moves
    states = np.zeros((len(level), 8), np.float32)
    states[:, 0], states[:, 2:4] = 0.01 * np.cumsum([0, *moves]), [0.3, math.pi]
    images = np.broadcast_to(level[:, None, None, None, None], (len(level), 2, 3, SIZE, SIZE)).astype(np.uint8)
    return Episode(images.copy(), states, actions, level > 100, L, task, f"task {task}", "explore", 0)


EPISODES = [episode([1, 2, 3]), episode([1, 1, 1, 1, 1, 1]), episode([2, 0, -2, 1]), episode([0, 3])]


def test_copies_that_a_killed_run_has_imagined_are_not_imagined_again(tmp_path, monkeypatch):
    first = imagined_copies(Mover(), EPISODES, tmp_path)
    monkeypatch.setattr(fidelity, "imagine_episodes", lambda *_, **__: pytest.fail("again"))
    assert all(np.array_equal(a.images, b.images) for a, b in zip(first, imagined_copies(Mover(), EPISODES, tmp_path)))
    (tmp_path / "00003.npz").unlink()
    with pytest.raises(pytest.fail.Exception, match="again"):
        imagined_copies(Mover(), EPISODES, tmp_path)


def test_a_perfect_world_has_no_error_whatever_the_lengths_and_other_actions_are_punished():
    data = ChunkData(EPISODES, L, "cpu")
    played = list(open_loop(Mover(), None, data, [(k, 0) for k in range(4)], 10, batch=3))
    for track, (frames, states, scores) in zip(data.tracks, played):
        assert np.array_equal(frames, track.images) and np.allclose(states, track.states, atol=1e-6)
        assert np.isnan(scores).all() and len(scores) == len(track.actions)
    lost = Mover()
    lost.predict_state = lambda images, states, *_: states[:, 1] + 1
    for track, (frames, states, _) in zip(data.tracks, open_loop(lost, None, data, [(k, 0) for k in range(4)], 10, true_states=True)):
        assert np.array_equal(states, track.states), "the robot goes where it truly went"
    (levels, _, _), = open_loop(Mover(), None, data, [(1, 0)], 10, [(3, 1)])
    assert levels[:, 0, 0, 0, 0].tolist() == [50, 80, 80, 110, 110, 140, 140], "other actions begin anew where they end"
    errors = horizon_errors(Mover(), EPISODES, horizons=(1, 2), every=1)
    assert errors["psnr_wrist_2_predicted"] == 100 and errors["ssim_agentview_1_predicted"] == 1
    assert errors["psnr_wrist_2_still"] < 30 and errors["psnr_wrist_2_shuffled"] < 40
    assert errors["state_mm_2"] == 0 and errors["starts_2"] == 11 and errors["episodes"] == 4


def test_the_nearest_training_episode_is_of_the_same_task_and_is_played_on():
    library = [episode([1, 2, 3]), episode([2, 2, 2], task=1), episode([9, 9, 9], task=0, start=0)]
    errors = horizon_errors(Mover(), [episode([1, 2, 3]), episode([1, 1, 1], task=1)], (2,), every=9, library=library)
    squares = np.mean([0, (20 / 255) ** 2])  # the first is found exactly; the second is 2 x 10 too bright
    assert errors["psnr_agentview_2_nearest"] == pytest.approx(-10 * math.log10(squares), abs=0.01)


def test_ssim_is_that_of_flat_windows():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 32, 32)).astype(np.float64)
    mean = lambda x: uniform_filter(x, 7)[3:-3, 3:-3]
    cov = lambda x, y: (mean(x * y) - mean(x) * mean(y)) * 49 / 48
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = ((2 * mean(a) * mean(b) + c1) * (2 * cov(a, b) + c2)
                / ((mean(a) ** 2 + mean(b) ** 2 + c1) * (cov(a, a) + cov(b, b) + c2))).mean()
    wide = lambda x: torch.from_numpy(x.astype(np.uint8)).expand(1, 2, 3, 32, 32)
    assert torch.allclose(ssim(wide(a), wide(b)), torch.full((1, 2), expected).float(), atol=1e-4)


def test_an_imagined_episode_keeps_its_true_labels_and_verdicts_are_compared_with_them():
    imagined, scores = imagine_episodes(Mover(), Bright(), EPISODES)
    assert [len(values) for values in scores] == [3, 6, 4, 2]
    assert all(np.array_equal(a.success, b.success) and a.source == "imagined" for a, b in zip(imagined, EPISODES))
    right = outcome_agreement(scores, EPISODES, ONE)
    assert right["agreement"]["count"] == 4 and right["missed_success"]["of"] == 2
    taken_up = EPISODES[0].until(2 * L).followed_by(episode([-1, 2], start=200))  # its first two chunks are not Mover's
    (again,), (score,) = imagine_episodes(Mover(), Bright(), [taken_up])
    assert np.array_equal(again.images, taken_up.images) and again.past == 2 and len(score) == 2
    wrong = [np.array([0.1]), np.array([0.9]), np.array([0.2, 0.6]), np.array([0.7])]  # truth: yes, yes, no, no
    cells = outcome_agreement(wrong, EPISODES, ONE)
    assert {name: (cell["count"], cell["of"]) for name, cell in cells.items()} == {
        "agreement": (1, 4), "false_success": (2, 2), "missed_success": (1, 2)}
    assert agreement([], [])["agreement"] == {"count": 0, "of": 0, "rate": None, "ci95": [0.0, 1.0]}
    assert reflector_quality(Bright(), imagined, L, ONE)["auroc"] == 1


def test_stability_sees_noise_that_decides_the_verdict():
    assert stability(Mover(), Bright(), EPISODES, ONE, noises=3) == {"verdict_variance": 0.0, "not_unanimous": 0.0}
    near = [episode([5, 0])] * 4  # ends at 100 exactly: only noise lifts it
    assert stability(Mover(noise=2000.0), Bright(), near, ONE, noises=6)["not_unanimous"] > 0


def test_an_object_that_vanishes_is_a_violation_unless_the_gripper_is_there():
    true, world = episode([0, 0, 0]), Mover()
    hand = gripper_pixels(CAMERAS, torch.from_numpy(true.states[:1]), SIZE)[0]
    for corner, expected in [((0, 0), 1 / 3), (hand.int().tolist(), 0.0)]:
        true.images[:] = 50
        x, y = corner
        true.images[:, 0, :, y:y + 8, x:x + 8] = 200
        imagined = episode([0, 0, 0])
        imagined.images = true.images.copy()
        imagined.images[2:, 0, :, y:y + 8, x:x + 8] = 50
        found = violations(world, [true], [imagined], reach=12)
        assert found["violating_steps"] == pytest.approx(expected), corner
        assert violations(world, [imagined], [imagined])["violating_steps"] == 0, "it truly vanished"


def test_the_probe_answers_in_pixels_of_the_picture():
    probe = GripperProbe()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.zero_()
    assert torch.allclose(probe(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)), torch.tensor([[SIZE / 2, SIZE / 2]]))


@pytest.mark.parametrize("change, words", [({"psnr_wrist_1_predicted": 19.0}, "wrist"),
                                           ({"psnr_agentview_1_shuffled": 31.0}, "agentview"), ({}, None)])
def test_rl_is_refused_in_a_world_that_does_not_follow_its_actions(change, words):
    world = {f"psnr_{view}_1_{kind}": value for view in ("agentview", "wrist")
             for kind, value in (("predicted", 25.0), ("still", 20.0), ("shuffled", 19.0))} | change
    def quality(auroc, found, on_true_frames=7, fooled=0):  # successes found, of 7; failures that are taken for one, of 9
        verdicts = lambda count: [True] * count + [False] * (7 - count) + [True] * fooled + [False] * (9 - fooled)
        return {frames: {"auroc": auroc, "outcome": agreement(verdicts(count), [True] * 7 + [False] * 9)}
                for frames, count in (("imagined", found), ("true", on_true_frames))}
    if words is None:
        check_trust(world, quality(0.9, 4, fooled=3))
        with pytest.raises(UserError, match="4 of 7 held-out successes, but 4 of 9 failures are imagined"):  # 0.57 - 0.44
            check_trust(world, quality(0.9, 4, fooled=4))
        with pytest.raises(UserError, match="of 7 held-out successes 3 are successes in imagination, 7 on true frames"):
            check_trust(world, quality(0.9, 3))
        for reflector, at_fault in ((quality(None, 1), "reflector"), (quality(0.65, 1), "reflector"),
                                    (quality(0.94, 0, 0), "reflector"), (quality(0.94, 0), "world simulator")):
            with pytest.raises(UserError, match=f"the {at_fault} cannot be trusted.*--trust_world"):
                check_trust(world, reflector)  # the last two pay nothing
    else:
        with pytest.raises(UserError, match=words):
            check_trust(world, quality(0.9, 1))


def test_hands_are_compared_chunk_by_chunk_while_both_last():
    true = [np.zeros((12, 8)), np.zeros((4, 8)), np.zeros((12, 8))]
    imagined = [np.zeros((12, 8)), np.zeros((12, 8)), np.zeros((3, 8))]
    imagined[0][:, 0], imagined[1][:, 1], imagined[2][:, 2] = 0.001 * np.arange(12), 0.003 * np.arange(12), 0.002 * np.arange(3)
    imagined[0][:, 6] = 1.0  # fingers are no places
    apart = hand_apart(true, imagined, chunks=(1, 3, 5, 20))
    assert apart == pytest.approx({"hand_apart_mm_1": 2.0, "hand_apart_mm_3": 6.0, "hand_apart_mm_5": 5.0})


def test_a_film_says_of_an_episode_what_the_table_says(tmp_path, monkeypatch):
    failed = next(episode for episode in EPISODES if not episode.success.any())  # at chunk boundaries; between two it held
    failed.save(tmp_path / "a.npz")
    films = []
    monkeypatch.setattr(evaluate, "film", lambda *arguments: films.append(arguments))
    line = {"task_id": 0, "seed": 0, "file": "a.npz", "oracle_stop": True}
    evaluate.film_some([line], tmp_path, tmp_path / "videos", 1, None, None, 0.5)
    assert films[0][5] is True
