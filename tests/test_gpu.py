"""What is learned and played on a GPU is what the CPU learns and plays: every tensor is on its device."""
import pytest
import torch

from test_distributed import train_all


def test_the_pretended_gpu_refuses_what_a_gpu_refuses(gpu):
    there, here = torch.arange(3.0, device=gpu), torch.arange(3.0)
    assert (there + 1).device == gpu and (2 * there).cpu().tolist() == [0, 2, 4] and there[there > 0].tolist() == [1, 2]
    assert there[torch.tensor([2, 0])].tolist() == [2, 0], "indices may be the CPU's"
    there[1:] = here[:2]
    assert there.tolist() == [0, 0, 1], "and what is copied"
    for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there.long()],
                  lambda: torch.nn.Linear(3, 1)(there[None]), lambda: torch.where(here > 0, there, there), lambda: there.numpy(),
                  lambda: torch.randn(3, generator=torch.Generator(), device=gpu)):
        with pytest.raises(RuntimeError, match="two devices|another device|numpy"):
            mixed()


def test_every_training_and_playing_is_the_same_on_it(gpu, tmp_path):
    (weights, log), (expected, other) = (train_all(tmp_path / device.type, device=device)
                                         for device in (gpu, torch.device("cpu")))
    for name in expected:
        assert expected[name].norm() > 1e-3 and (weights[name].cpu() - expected[name]).abs().max() < 1e-5, name
    for name in ("stopped", "lasted", "episodes"):
        assert log[name] == other[name], name
