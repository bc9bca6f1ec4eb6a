"""Pictures become files and come back."""

import torch

from vaelab.viz.encoding import decode_picture, encode_picture

PICTURE = torch.linspace(-1, 1, 3 * 16 * 16).reshape(3, 16, 16)


def test_pictures_survive_being_encoded():
    for side in (16, 400):
        smooth = torch.nn.functional.interpolate(PICTURE[None], (side, side), mode="bilinear")[0]
        back = decode_picture(encode_picture(smooth))
        assert back.shape == smooth.shape and (back - smooth).abs().mean() < (0.005 if side == 16 else 0.05)
