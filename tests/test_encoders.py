"""Promises of encoders.py: tiny random models of the real classes, saved to disk and loaded as the real ones are."""
import pytest
import torch
import transformers
from diffusers import AutoencoderKL

from encoders import GridEncoder, Injection, Latents, PretrainedEncoder
from runs import UserError
from test_virtual_env import make_actions, make_contexts, play
from test_world_model import CAMERAS, NORMALIZER, TINY, toy_batch
from virtual_env import VirtualEnv, VirtualEnvConfig
from vlm_tiny import tiny_encoder, tiny_vae
from world_model import WorldModel, world_model_loss


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip"])
def test_tokens_are_those_of_the_model_behind_its_own_processor(kind, tmp_path):
    name = tiny_encoder(tmp_path, kind)
    encoder = PretrainedEncoder(name)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = transformers.AutoModel.from_pretrained(name).eval()
    model = getattr(model, "vision_model", model)
    processor = transformers.AutoImageProcessor.from_pretrained(name)
    inputs = processor(images=list(images), do_rescale=False, do_resize=False, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    tokens = encoder(images * 2 - 1)
    assert tokens.shape[2] == 16 and torch.allclose(tokens, expected, atol=1e-4)
    assert not list(encoder.parameters()) and not encoder.state_dict()
    assert encoder(torch.rand(1, 3, 16, 16)).shape == (1, *tokens.shape[1:]), "other sizes are brought to the model's"


def test_a_model_that_is_none_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="world_model.encoders"):
        PretrainedEncoder(str(tmp_path))


def test_tokens_of_views_and_encoders_are_told_apart_and_keep_their_order(tmp_path):
    torch.manual_seed(0)
    injection = Injection(("ours", tiny_encoder(tmp_path, "dinov2")), 32)
    images = torch.rand(2, 2, 3, 32, 32)
    tokens = injection(images)
    assert tokens.shape == (2, 2 * 16 + 2 * 17, 32)  # 4x4 tokens of ours, 4x4 + 1 of DINOv2
    images[:, 1] = 0
    changed = (injection(images) != tokens).any(dim=2).all(dim=0)
    assert changed.tolist() == [False] * 16 + [True] * 16 + [False] * 17 + [True] * 17
    assert (injection(images[:, [0, 0]])[:, :16] != injection(images[:, [0, 0]])[:, 16:32]).any()


def test_the_token_grid_has_a_place_for_every_eight_pixels():
    assert GridEncoder(32)(torch.zeros(1, 3, 64, 64)).shape == (1, 64, 32)


@pytest.mark.parametrize("kind", ["ours", "clip"])
def test_the_simulator_attends_to_them_and_is_saved_without_the_frozen_ones(kind, tmp_path):
    name = "ours" if kind == "ours" else tiny_encoder(tmp_path / "encoder", kind)
    torch.manual_seed(0)
    model = WorldModel(TINY.__class__(**{**vars(TINY), "encoders": (name,), "ray_maps": True}), CAMERAS, NORMALIZER).eval()
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    model.save_pretrained(tmp_path / "world")
    again = WorldModel.from_pretrained(tmp_path / "world").eval()
    contexts, actions = make_contexts(2), make_actions(2, 2)
    one, two = (play(VirtualEnv(m, None, VirtualEnvConfig(), 2), contexts, actions) for m in (model, again))
    assert torch.equal(one, two) and not any("frozen" in key for key in model.state_dict())
    with torch.no_grad():
        model.injection.view += 3 * torch.randn_like(model.injection.view)
    assert not torch.equal(one, play(VirtualEnv(model, None, VirtualEnvConfig(), 2), contexts, actions))


def test_latents_are_those_of_the_vae_whether_it_lies_alone_or_in_a_pipeline(tmp_path):
    vae = AutoencoderKL.from_pretrained(tiny_vae(tmp_path / "vae")).eval()
    images = torch.rand(2, 6, 16, 16) * 2 - 1  # two pictures a sample
    for name in (tmp_path, tmp_path / "vae"):
        latents = Latents(str(name))
        z = latents.encode(images)
        assert z.shape == (2, 2 * latents.channels, 16 // latents.factor, 16 // latents.factor)
        with torch.no_grad():
            mean = vae.encode(images[:, 3:]).latent_dist.mean
            torch.testing.assert_close(z[:, 4:], (mean - 0.1) * 0.5)
            torch.testing.assert_close(latents.decode(z)[:, 3:], vae.decode(mean).sample)


def test_the_simulator_diffuses_latents_and_leaves_the_vae_as_it_is(tmp_path):
    tiny_vae(tmp_path / "vae")
    config = TINY.__class__(**{**vars(TINY), "vae": str(tmp_path / "vae"), "patch": 1, "ray_maps": True})
    torch.manual_seed(0)
    model = WorldModel(config, CAMERAS, NORMALIZER)
    frozen = {name: value.clone() for name, value in model.latents.vae.state_dict().items()}
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(30):
        loss, metrics = world_model_loss(model, toy_batch(4), torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and not any("vae" in name for name in model.state_dict())
    assert all(torch.equal(value, frozen[name]) for name, value in model.latents.vae.state_dict().items())
    model.eval().save_pretrained(tmp_path / "world")
    contexts, actions = make_contexts(2), make_actions(2, 2)
    one, two = (play(VirtualEnv(m, None, VirtualEnvConfig(), 2), contexts, actions)
                for m in (model, WorldModel.from_pretrained(tmp_path / "world").eval()))
    assert torch.equal(one, two) and one.dtype == torch.uint8
    blank = model.latents.decode(torch.zeros(1, *model.diffused))
    model.latents.vae.decoder.conv_out.bias.data += 0.5  # what is seen comes out of the decoder
    assert (model.latents.decode(torch.zeros(1, *model.diffused)) - blank).mean() == pytest.approx(0.5, abs=1e-4)
    assert not torch.equal(one, play(VirtualEnv(model, None, VirtualEnvConfig(), 2), contexts, actions))


def test_what_is_no_vae_and_pictures_that_do_not_fit_are_clear_lines(tmp_path):
    with pytest.raises(UserError, match="world_model.vae"):
        Latents(str(tmp_path))
    with pytest.raises(UserError, match="--world_model.image_size 18 "):
        WorldModel(TINY.__class__(**{**vars(TINY), "image_size": 18}), CAMERAS, NORMALIZER)
