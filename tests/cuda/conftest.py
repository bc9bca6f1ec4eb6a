"""Where the tests marked ``cuda`` run.

They need a GPU and are skipped with that reason where there is none. ``VAELAB_CUDA_TESTS_ON=cpu`` rehearses every one
of them on the CPU, to know that the tests themselves work.
"""

import os

import accelerate
import pytest
import torch

DEVICE = os.environ.get("VAELAB_CUDA_TESTS_ON", "cuda")


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and torch.device(DEVICE).type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and there is none on this machine")


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 products in float32: what is compared with float64 must not be TensorFloat-32's."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture(autouse=True)
def loss_scaler_in_a_rehearsal(monkeypatch):
    """accelerate leaves float16 out on a CPU: in a rehearsal it gets the scaler and the autocast it has on a GPU."""
    if torch.device(DEVICE).type != "cpu":
        return
    built = accelerate.Accelerator.__init__

    def init(self, *arguments, **options):
        built(self, *arguments, **options)
        if self.state.mixed_precision == "fp16":
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu")

    monkeypatch.setattr(accelerate.Accelerator, "__init__", init)
