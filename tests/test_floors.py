import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vaelab

PACKAGE = Path(vaelab.__file__).parent
FLOORS = [
    ["buffers", "checks", "files", "plots", "preprocessing", "sae_kernels", "removal", "mechanism"],
    ["devices", "checkpoints", "folders", "frontpage", "hooks", "panels", "planted", "sae_choice", "sae_peers",
     "sae_plots", "shuffling", "world", "noise_loss", "mask_plots", "probe", "purity", "pca", "readout_plots",
     "locations", "storage", "lasting", "channel_plots", "configs"],
    ["blocks", "channels", "embedded_data", "oracle", "perceptual", "prompts", "report", "sae", "shards", "text_model",
     "training", "clip_names"],
    ["models", "baselines", "data", "nudge", "planning", "runs", "sae_formats", "sae_training", "writing",
     "conclusions", "items"],
    ["conditioning", "fidelity", "lens", "lessons", "store", "vae", "latents", "sampling", "labelled"],
    ["denoise", "study", "text_to_image", "masked_measures", "examples", "features", "diffusion_classifier",
     "bench_store"],
    ["ablate", "causes", "collect", "comparison", "judging", "pruning", "diffc", "layer_features", "class_to_image"],
    ["bench", "sae_batches", "sae_grid", "substitute", "collapse", "readout_tables", "label_purity"],
    ["bench_sae", "sae_runs", "savings", "readout"],
]  # fmt: skip
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
HEAVY = {"torch", "numpy", "pandas", "matplotlib", "scipy", "diffusers", "transformers", "accelerate", "datasets"}


def imported(source, modules):
    """Which of the package's ``modules`` the source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "vaelab" if node.level else ""
            whole = ".".join(part for part in (start, node.module) if part)
            paths = [whole, *(f"{whole}.{alias.name}" for alias in node.names)]
        else:
            continue
        split = [path.split(".") for path in paths]
        found |= {parts[1] for parts in split if parts[0] == "vaelab" and len(parts) > 1 and parts[1] in modules}
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import vaelab.hooks", {"hooks"}),
        ("from vaelab import hooks, data as d", {"hooks", "data"}),
        ("from vaelab.hooks import data", {"hooks"}),
        ("from . import hooks", {"hooks"}),
        ("from .hooks import capture", {"hooks"}),
        ("def late():\n    from vaelab import hooks", {"hooks"}),
        ("from vaelab import __version__\nimport hooks\nfrom data import x", set()),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert imported(source, ["hooks", "data"]) == expected


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_floors(module):
    assert module in FLOOR_OF, f"vaelab/{module}.py stands on no floor: give it one in tests/test_floors.py"
    sources = imported((PACKAGE / f"{module}.py").read_text(), MODULES)
    homeless = sources - FLOOR_OF.keys()
    assert not homeless, f"{module} imports {sorted(homeless)}, which stand on no floor"
    wrong = {f"{source} (floor {FLOOR_OF[source]})" for source in sources if FLOOR_OF[source] >= FLOOR_OF[module]}
    assert not wrong, f"{module} (floor {FLOOR_OF[module]}) imports from its own floor or above: {sorted(wrong)}"


def test_no_module_stands_on_two_floors():
    assert sum(map(len, FLOORS)) == len(FLOOR_OF)


def test_importing_the_package_imports_nothing_heavy_and_is_quick():
    script = (
        "import sys, time; before = set(sys.modules); start = time.perf_counter(); import vaelab; "
        "print(time.perf_counter() - start, *(set(sys.modules) - before))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    seconds, *loaded = result.stdout.split()
    assert float(seconds) < 0.3
    assert "vaelab" in loaded
    assert not HEAVY & set(loaded)
