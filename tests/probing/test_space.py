from types import SimpleNamespace

import pytest

from vaelab.core import disk
from vaelab.probing import space


def test_a_training_that_the_disk_cannot_hold_is_refused_before_it_starts(tmp_path, monkeypatch, capsys):
    """Two models of 100 and 50 parameters: weights, checkpoints, and the largest checkpoint a second time."""
    expected = 150 * 4 + 150 * 12 + 100 * 12
    assert space.require_training_space("2 models", 100, 150, tmp_path / "not" / "yet", together=False) == expected
    assert space.require_training_space("2 models", 100, 150, tmp_path, together=True) == 150 * 28
    assert "2 models: 150 parameters; 3.6e-06 GB on disk" in capsys.readouterr().out
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=expected - 1))
    with pytest.raises(ValueError, match=r"^output_dir: the training of 2 models takes 3.6e-06 GB"):
        space.require_training_space("2 models", 100, 150, tmp_path, together=False)
