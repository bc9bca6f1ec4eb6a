import pytest
import torch
from small_latents import small_unet

from vaelab import savings


def test_savings_count_what_is_gone_and_time_each_part(tiny_vae):
    table = savings.savings(tiny_vae, small_unet(), [2, 0, 1, 3], torch.randn(2, 4, 8, 8), rounds=2)
    assert list(zip(table["part"], table["kept"], table["twin"], strict=True)) == [
        (part, kept, twin) for part in ("denoise", "decode")
        for kept, twin in ((4, False), (4, True), (3, False), (2, False), (1, False))
    ]  # fmt: skip
    denoise = table[table["part"] == "denoise"].set_index("kept")["parameters"]
    gone_with_one = 9 * 8 + 9 * 8 + 1  # of conv_in, of conv_out, and a bias
    assert denoise[3] == denoise.iloc[0] - gone_with_one and denoise[1] == denoise.iloc[0] - 3 * gone_with_one
    assert (table["milliseconds"] > 0).all() and (table["peak_bytes"] > 0).all()
    assert table.loc[0, "saved"] == 0
    assert (table["saved_low"] <= table["saved"]).all() and (table["saved"] <= table["saved_high"]).all()


def test_peak_memory_is_what_is_held_at_once():
    def holds_two_of_three(_):
        first = torch.ones(1 << 18)
        second = first + 1
        del first
        return second * 2

    found = savings.peak_bytes(holds_two_of_three, torch.device("cpu"))
    assert found == pytest.approx(2 * 4 * (1 << 18), rel=0.05)
