"""The tour's widgets: a block of a denoiser switched off, and one channel of an autoencoder's layer enlarged."""

import io
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from vaelab import activations, models, viz
from vaelab.activations.denoiser import Sampling
from vaelab.hooks import capture
from vaelab.models.vocabulary import require_known_words
from vaelab.sae import interventions

STYLE = {"description_width": "70px"}


def png(figure: Figure) -> bytes:
    """Encode a figure as PNG, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


class _Viewer(widgets.VBox):
    """Controls above one image, whose bytes are replaced when a control changes, and a line for an error.

    A subclass has a method ``draw``, which returns the figure that the controls ask for.
    """

    def __init__(self, controls: Sequence[widgets.Widget]):
        self.image = widgets.Image(format="png", layout={"max_width": "100%"})
        self.error = widgets.Label()
        row = widgets.HBox(list(controls), layout={"flex_flow": "row wrap"})
        super().__init__([row, self.error, self.image])
        for control in controls:
            control.observe(self._changed, names="value")
        self.show()

    def show(self) -> None:
        """Replace the image; if the controls cannot be used as they are, keep it and show the reason."""
        try:
            self.image.value, self.error.value = png(self.draw()), ""
        except ValueError as error:
            self.error.value = str(error)

    def _changed(self, _: dict) -> None:
        self.show()


class BlockSwitch(_Viewer):
    """Pictures of one prompt, without and with a block's update switched off."""

    def __init__(self, pipeline: Any, prompt: str, block: str, *, seed: int = 0, pictures: int = 4):
        """Args:
        pipeline: a text-to-image pipeline.
        prompt: the first prompt.
        block: the short name of the block that is chosen first.
        seed: the seed of the first picture.
        pictures: the number of pictures in a row.
        """
        self._pipeline, self._count = pipeline, pictures
        names = interventions.blocks_with_updates(pipeline)
        self.block = widgets.Dropdown(options=names, value=block, description="block", style=STYLE)
        self.prompt = widgets.Text(value=prompt, description="prompt", continuous_update=False, style=STYLE)
        self.seed = widgets.BoundedIntText(value=seed, max=2**31, description="seed", style=STYLE)
        self.off = widgets.Checkbox(value=True, description="switched off", style=STYLE)
        super().__init__([self.block, self.prompt, self.seed, self.off])

    def draw(self) -> Figure:
        """Draw the pictures; with the switch, also those without the block.

        Raises:
            ValueError: the prompt has words that the text model never learned.
        """
        require_known_words(self._pipeline, self.prompt.value)
        prompts, sampling, seed = [self.prompt.value] * self._count, Sampling(), self.seed.value
        rows = {"unchanged": activations.generate_all(self._pipeline, prompts, sampling, seed=seed)}
        if self.off.value:
            without = interventions.generate_without_block(
                self._pipeline, prompts, self.block.value, sampling, seed=seed
            )
            rows[f"no {self.block.value}"] = without
        return viz.picture_grid(rows, self.prompt.value)


class ChannelViewer(_Viewer):
    """One channel of a layer of an autoencoder, beside the picture."""

    def __init__(self, vae: nn.Module, pictures: Tensor, layers: Sequence[str], layer: str):
        """Args:
        vae: the autoencoder.
        pictures: (N, 3, H, W) in [-1, 1], on the autoencoder's device.
        layers: the paths of the layers that can be chosen.
        layer: the path of the layer that is chosen first.
        """
        self._vae, self._pictures, self._captured = vae, pictures, {}
        self.layer = widgets.Dropdown(options=list(layers), value=layer, description="layer", style=STYLE)
        self.picture = widgets.IntSlider(max=len(pictures) - 1, description="picture", continuous_update=False)
        self.channel = widgets.IntSlider(max=len(self._maps()[0]) - 1, description="channel", continuous_update=False)
        super().__init__([self.layer, self.picture, self.channel])

    def draw(self) -> Figure:
        """Draw the chosen channel enlarged, beside the picture."""
        maps = self._maps()
        self.channel.max = maps.shape[1] - 1
        figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.4), layout="constrained")
        left.imshow(viz.displayable(self._pictures)[self.picture.value], interpolation="nearest")
        shown = right.imshow(maps[self.picture.value, self.channel.value].numpy(), cmap="vlag", interpolation="nearest")
        figure.colorbar(shown, ax=right, label="activation")
        right.set_title(f"channel {self.channel.value}", fontsize=10)
        for axis in (left, right):
            axis.axis("off")
        return figure

    def _maps(self) -> Tensor:
        """The outputs (N, C, h, w) of the chosen layer; those of the last layer are kept."""
        layer = self.layer.value
        if layer not in self._captured:
            with capture(self._vae, layer, to="cpu") as seen:
                models.reconstruct(self._vae, self._pictures)
            self._captured = {layer: seen[layer][0].float()}
        return self._captured[layer]
