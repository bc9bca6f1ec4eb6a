import matplotlib
import pytest
import torch

matplotlib.use("agg")

from vaelab import browser, models
from vaelab.vae import channels


@pytest.fixture(scope="module")
def switch():
    return browser.BlockSwitch(models.load_pipeline("embedded", device="cpu"), "a red star", "up.1.0", pictures=1)


def test_controls_have_labels_and_the_switch_changes_the_picture(switch):
    assert all(control.description for control in switch.children[0].children)
    both = switch.image.value
    switch.off.value = False
    assert switch.image.value != both and switch.error.value == ""
    switch.off.value = True
    assert switch.image.value == both


def test_an_unknown_word_is_named_and_the_picture_stays(switch):
    before = switch.image.value
    switch.prompt.value = "a red zebra"
    assert switch.error.value == "prompt: the text model does not know 'zebra'" and switch.image.value == before
    switch.prompt.value = "a red star"
    assert switch.error.value == ""


def test_a_channel_is_enlarged_and_the_slider_follows_the_layer():
    vae = models.load_vae("embedded", device="cpu")
    layers = sorted(channels.groupnorms(vae), key=lambda path: -vae.get_submodule(path).num_channels)
    viewer = browser.ChannelViewer(vae, torch.zeros(2, 3, 32, 32), layers, layers[0])
    first, most = viewer.image.value, vae.get_submodule(layers[0]).num_channels - 1
    assert viewer.channel.max == most
    viewer.channel.value = most
    assert viewer.image.value != first
    viewer.layer.value = layers[-1]
    fewest = vae.get_submodule(layers[-1]).num_channels - 1
    assert viewer.channel.max == fewest < most and viewer.channel.value <= fewest
