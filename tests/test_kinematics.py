"""Promises of kinematics.py."""
import math

import pytest
import torch
import torch.nn.functional as F

from episodes import Normalizer
from fidelity import gripper_pixels
from geometry import MAX_OPENING, Camera, Cameras, openness, turn_between
from kinematics import (BINS, LIFTS, GraspPredictor, PosePredictor, around_hand, contact_bins, free_air_loss, in_contact, moved,
                        opening, quantile, state_features, surroundings)

CAMERAS = Cameras(Camera(45.0, [0.9, 0.0, 0.65], [[0.0, -0.6, 0.8], [1.0, 0.0, 0.0], [0.0, 0.8, 0.6]]),
                  Camera(75.0, [0.05, 0.0, -0.097], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]), 0.0)
NORMALIZER = Normalizer([-1.0] * 7, [1.0] * 7, [-0.3, -0.3, 0.0, -3.5, -3.5, -3.5, 0.0, -0.04],
                        [0.3, 0.3, 0.5, 3.5, 3.5, 3.5, 0.04, 0.0])
START = torch.tensor([0.0, 0, 0.3, math.pi, 0, 0, 0.03, -0.03])


def test_the_pose_starts_at_the_kinematics():
    predictor, state, none = PosePredictor(4, 32), START.expand(2, 8), torch.zeros(2, 4, 7)
    features = state_features(state, NORMALIZER)
    assert torch.allclose(moved(state, predictor(features, none, none)), state, atol=1e-5)
    push = none.clone()
    push[:, :, 0], push[:, :, 5] = 1, 0.5
    after = moved(state, predictor(features, none, push))
    assert torch.allclose(after[:, :3] - state[:, :3], torch.tensor([0.042, 0, 0]).expand(2, 3), atol=1e-5)
    assert torch.allclose(turn_between(state, after), torch.tensor([0, 0, 0.2]).expand(2, 3), atol=1e-5)
    assert torch.equal(after[:, 6:], state[:, 6:])


def test_hands_that_touch_something_do_not_bend_the_kinematics():
    """Two steps of five end 30 mm higher than in free air, the others spread by 1 mm around it."""
    change = 0.02 * torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    change[:400, 2] += 0.6
    free = torch.zeros(6, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=0.003)
    for _ in range(300):
        optimizer.zero_grad()
        free_air_loss(free - change).backward()
        optimizer.step()
    assert free.abs().max() < 0.005, "absolute error is least at 0.019"


def holding(metres):
    """START with the fingers (B,) m apart."""
    state = START.repeat(len(metres), 1)
    state[:, 6], state[:, 7] = metres / 2, -metres / 2
    return state


@pytest.mark.parametrize("metres, lift", [(0.0, 0.0), (0.031, 0.042), (MAX_OPENING, -0.016), (0.05, 0.061)])
def test_sure_distributions_give_back_opening_and_lift_within_their_bins(metres, lift):
    free, there = START[None], holding(torch.tensor([metres]))
    there[:, 2] += lift
    target, place = contact_bins(free, there)
    logits, places = 50 * F.one_hot(target, BINS).float(), place[..., None].expand(1, 2, BINS)
    for uniform in (0.01, 0.5, 0.99):
        state = in_contact(free, logits, places, torch.tensor([uniform]))
        assert (opening(state) - metres).abs() < 1e-5 and state[0, 6] == -state[0, 7], "whatever the quantile"
        assert (state[0, 2] - there[0, 2]).abs() < (LIFTS / BINS / 2 if lift == 0 else 1e-5)
        assert torch.equal(state[:, [0, 1, 3, 4, 5]], free[:, [0, 1, 3, 4, 5]]), "nothing else moves"


def test_a_hand_in_free_air_is_where_kinematics_puts_it():
    logits = torch.zeros(1, 2, BINS)
    none = contact_bins(START[None], START[None])[0][0, 1]
    logits[:, 1, none], logits[:, 1, none + 1] = 20.4, 20  # three to two that nothing lifts it
    assert torch.allclose(in_contact(START[None], logits, torch.rand(1, 2, BINS), torch.tensor([0.5]))[:, :3], START[None, :3], atol=1e-5)


def test_openings_are_drawn_as_often_as_the_distribution_says():
    probability = torch.zeros(BINS)
    probability[0], probability[10], probability[11] = 0.3, 0.5, 0.2  # holds nothing; holds an object
    uniform = (torch.arange(2000) + 0.5) / 2000
    places = torch.rand(BINS, generator=torch.Generator().manual_seed(0)).expand(2000, BINS)
    drawn = quantile((probability + 1e-9).log().expand(2000, BINS), places, uniform)
    found = torch.bincount((drawn * BINS).long().clamp(max=BINS - 1), minlength=BINS) / 2000
    assert torch.allclose(found, probability, atol=0.002)
    assert torch.allclose((drawn * BINS)[[0, 1000, 1999]] % 1, places[0, [0, 10, 11]], atol=1e-4)
    assert (drawn.diff() >= 0).all(), "a group that shares its uniform number must not be reordered"


def test_fingers_are_imagined_on_air_or_on_a_rim_and_never_between():
    """As in LIBERO-Spatial: 1 mm apart on air, 4 mm on a bowl's rim. Neither may be drawn where the other is likelier."""
    bins, places = (value[:, 0] for value in contact_bins(START.expand(2, 8), holding(torch.tensor([0.001, 0.004]))))
    uniform = (torch.arange(100) + 0.5) / 100
    logits = torch.full((100, 2, BINS), -20.0)
    logits[:, 0, bins[0]], logits[:, 0, bins[1]] = math.log(0.6), math.log(0.4)
    place = torch.zeros(100, 2, BINS)
    place[:, 0, bins] = places
    drawn = 1000 * opening(in_contact(START.expand(100, 8), logits, place, uniform))
    assert ((drawn[:60] - 1).abs() < 0.01).all() and ((drawn[60:] - 4).abs() < 0.01).all()


def test_a_hand_that_may_be_stopped_is_so_for_the_unlucky_share_of_the_draws_and_not_for_the_median():
    stopped = START.clone()
    stopped[2] += 0.04
    none, high = (contact_bins(START[None], state[None])[0][0, 1] for state in (START, stopped))
    logits, uniform = torch.full((100, 2, BINS), -20.0), (torch.arange(100) + 0.5) / 100
    logits[:, 1, none], logits[:, 1, high] = math.log(0.7), math.log(0.3)
    lift = in_contact(START.expand(100, 8), logits, torch.full((100, 2, BINS), 0.5), uniform)[:, 2] - START[2]
    assert ((lift[:30] - 0.04).abs() < 0.003).all() and (lift[30:].abs() < 1e-6).all()


def test_what_surrounds_the_hand_moves_with_it():
    """A picture shifted by as many pixels as the projected hand looks the same from the hand."""
    image = F.interpolate(torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 64, mode="bilinear")
    there = START[None].clone()
    there[:, 1] += 0.1  # to the right in this camera
    shift = (gripper_pixels(CAMERAS, there, 64) - gripper_pixels(CAMERAS, START[None], 64))[0]
    assert shift[0].abs() > 5 and shift[1].abs() < 1e-3
    grid = F.affine_grid(torch.tensor([[[1, 0, -2 * shift[0] / 64], [0, 1, 0]]]), (1, 3, 64, 64), align_corners=False)
    carried = F.grid_sample(image, grid, align_corners=False)
    middle = (slice(None), slice(None), slice(16, 48), slice(16, 48))
    assert torch.allclose(around_hand(image, START[None], CAMERAS)[middle], around_hand(carried, there, CAMERAS)[middle],
                          atol=0.1)
    assert not torch.allclose(around_hand(image, there, CAMERAS)[middle], around_hand(carried, there, CAMERAS)[middle], atol=0.3)


@pytest.mark.parametrize("when", [0, 1])
def test_a_grasp_is_learned_from_the_wrist_picture_of_now_or_of_a_chunk_ago(when):
    """Fingers that close: on an object where the wrist picture is bright in its middle, else on nothing. It lifts the hand."""
    torch.manual_seed(0)
    B, net = 16, GraspPredictor(4, 32, 8, dropout=0.0)
    holds = torch.arange(B) % 2 == 0
    images = (torch.rand(1, 2, 2, 3, 32, 32) - 1).repeat(B, 1, 1, 1, 1, 1)  # alike: nothing else tells them apart
    images[holds, when, 1, :, 12:20, 12:20] += 1
    state, actions = START.expand(B, 8), torch.ones(B, 4, 7)
    there = holding(0.04 * holds.float())
    there[:, 2] += 0.03 * holds
    target, place = contact_bins(state, there)
    states = state[:, None].expand(B, 2, 8)
    inputs = *surroundings(images, states, state, actions, actions, CAMERAS, NORMALIZER), opening(state), torch.zeros(B)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(90):
        logits, places = net(*inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        loss = loss + (places.gather(2, target[..., None])[..., 0] - place).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = in_contact(state, *net.eval()(*inputs), torch.full((B,), 0.5))
    assert ((opening(found) > 0.02) == holds).all() and ((found[:, 2] - START[2] > 0.015) == holds).all()
    assert (opening(found)[holds] - 0.04).abs().max() < 0.001, "to a fraction of a bin"


@pytest.mark.parametrize("which", [0, 1])
def test_fingers_can_be_told_to_stay_where_they_are_or_to_move_freely(which):
    net, apart = GraspPredictor(4, 32, 8, dropout=0.0).eval(), torch.linspace(0.003, 0.077, 16)
    with torch.no_grad():
        net.usual.bias[:2] = 0
        net.usual.bias[which] = 50
    now, free = (apart, apart.flip(0))[::1 - 2 * which]
    state, images, actions = holding(now), torch.rand(16, 2, 2, 3, 32, 32) - 1, torch.ones(16, 4, 7)
    states = torch.stack([state, state], dim=1)
    logits, places = net(*surroundings(images, states, state, actions, actions, CAMERAS, NORMALIZER), now, free)
    for place in (0.1, 0.5, 0.9):  # until it has learned otherwise, exactly there
        found = quantile(logits[:, 0], places[:, 0], torch.full((16,), place))
        assert (found - openness((now, free)[which])).abs().max() < (1e-5 if place == 0.5 else 1 / BINS)
