"""The reasoner: reduced maps, interleaved tokens, both stages, and a resume that ends in equal weights."""

import pytest
import small_language
import torch

from vaelab.models.language_model import LanguageModel, Turn
from vaelab.probing.reasoning import model as module
from vaelab.probing.reasoning.features import Statistics
from vaelab.probing.reasoning.model import (
    Conversation,
    PseudoTokens,
    StageConfig,
    VisualReasoner,
    answer_all,
    train_stage,
)

SHAPES = {"clip": (4, 6), "up_ft1.t25": (8, 8, 5), "noise": (4, 6)}
COLOURS = ["red", "blue"]


class Table:
    """Features of two pictures: every part is the picture's sign, with a little noise."""

    def take(self, rows):
        sign = torch.tensor([1.0 if row % 2 else -1.0 for row in rows])
        return {part: sign.reshape(-1, *[1] * len(shape)).expand(-1, *shape) for part, shape in SHAPES.items()}


CONVERSATIONS = [Conversation(i, (Turn("what colour is it?", COLOURS[i % 2]),)) for i in range(8)]


@pytest.fixture(scope="module")
def words():
    return small_language.tokenizer()


def reasoner(words, stream="clip + up_ft1.t25", architecture="llama", **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        language = small_language.ARCHITECTURES[architecture](len(words))
    return VisualReasoner(stream, SHAPES, LanguageModel(language, words), **options)


def weights(one):
    return {
        name: value.clone() for part in (one.adapters, one.language.model) for name, value in part.state_dict().items()
    }


@pytest.mark.parametrize("side", [4, 8, 16, 7])
def test_maps_are_reduced_to_the_grid_of_tokens_in_their_places(side):
    maps = torch.zeros(1, side, side, 2)
    maps[0, -1, 0] = 1.0  # the corner at the bottom left
    reduce = PseudoTokens((side, side, 2), 16, 6)
    with torch.no_grad():
        changed = (reduce(maps) - reduce(torch.zeros_like(maps))).abs().sum(-1)[0]
    assert reduce(maps).shape == (1, 16, 6)
    assert changed[12] > 2 * changed[3], "row by row: the last row begins with token 12, the first ends with 3"


def test_smaller_maps_are_interpolated():
    assert PseudoTokens((3, 3, 2), 16, 6)(torch.zeros(2, 3, 3, 2)).shape == (2, 16, 6)


def test_a_number_of_tokens_that_is_no_square_is_refused():
    with pytest.raises(ValueError, match=r"^image_encoder: it gives 15 tokens of a picture, no square number"):
        PseudoTokens((8, 8, 2), 15, 6)


def test_tokens_of_the_parts_alternate(words):
    one = reasoner(words)
    features = Table().take([0, 1])
    seen = one.see(features)
    assert seen.shape == (2, 8, 16)
    for number, part in enumerate(one.parts):
        assert torch.equal(seen[:, number::2], one.adapters[number](features[part]))
    assert reasoner(words, "none").see(features).shape == (2, 0, 16)


def test_twice_the_same_part_has_two_projectors(words):
    twice = reasoner(words, "clip + clip")
    first, second = (adapter.project[0].weight for adapter in twice.adapters)
    assert not torch.equal(first, second)
    seen = twice.see(Table().take([0]))
    assert not torch.allclose(seen[:, 0], seen[:, 1])


def test_features_are_standardized(words):
    statistics = {
        part: Statistics(torch.full((shape[-1],), 5.0), torch.full((shape[-1],), 2.0)) for part, shape in SHAPES.items()
    }
    plain, standard = reasoner(words, "clip"), reasoner(words, "clip", statistics=statistics)
    features = {"clip": torch.randn(1, 4, 6)}
    assert torch.allclose(plain.see(features), standard.see({"clip": 5 + 2 * features["clip"]}), atol=1e-5)


@pytest.mark.parametrize("architecture", small_language.ARCHITECTURES)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_both_stages_train_what_they_should(words, architecture, tuning):
    one = reasoner(words, architecture=architecture)
    before = weights(one)
    config = StageConfig(batch_size=4, learning_rate=1e-3, device="cpu")
    train_stage(one, Table(), CONVERSATIONS, config)
    after = weights(one)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if "project" in name or "reduce" in name} == moved and len(moved) == 12
    train_stage(one, Table(), CONVERSATIONS, config, tuning=tuning)
    changed = [name for name, p in one.language.model.named_parameters() if p.requires_grad]
    assert changed and all(("lora" in name) == (tuning == "lora") for name in changed)
    assert not one.language.model.training
    assert len(answer_all(one, Table(), [(0, "what colour is it?"), (1, "what?")], longest=3)) == 2


def test_a_stream_tells_the_pictures_apart_and_none_cannot(words):
    config = StageConfig(epochs=40, batch_size=8, learning_rate=1e-2, device="cpu")
    answers = {}
    for stream in ("up_ft1.t25", "none"):
        one = reasoner(words, stream)
        train_stage(one, Table(), CONVERSATIONS, config, tuning="full")
        answers[stream] = answer_all(one, Table(), [(row, "what colour is it?") for row in (3, 2, 1, 0)], longest=3)
    assert answers["up_ft1.t25"] == ["blue", "red", "blue", "red"]
    assert len(set(answers["none"])) == 1


class Killed(RuntimeError):
    """Stands for kill -9."""


@pytest.mark.parametrize("tuning", ["frozen", "full", "lora"])
def test_a_killed_training_is_resumed_to_equal_weights(words, tuning, tmp_path, monkeypatch):
    config = StageConfig(epochs=3, batch_size=4, learning_rate=1e-2, device="cpu", checkpoint_every=2)
    whole = reasoner(words)
    train_stage(whole, Table(), CONVERSATIONS, config, tuning=tuning)

    def dies(self, batch, forward=module._Stage.forward, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] == 4:
            raise Killed
        return forward(self, batch)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(module._Stage, "forward", dies)
        train_stage(reasoner(words), Table(), CONVERSATIONS, config, tuning=tuning, folder=tmp_path)
    torch.manual_seed(5)  # nothing depends on the process's own random state
    resumed = reasoner(words)
    trained = train_stage(resumed, Table(), CONVERSATIONS, config, tuning=tuning, folder=tmp_path)
    assert trained.resumed_at == 2
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: must be above 0"),
        ({"batch_size": 0}, "batch_size: must be at least 1"),
        ({"batch_size": 4, "accumulation": 3}, "accumulation: 3 does not divide batch_size 4"),
        ({"warmup_ratio": 1.0}, "warmup_ratio: expected a share below 1"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        StageConfig(**options)


def test_nothing_to_train_is_refused(words):
    with pytest.raises(ValueError, match=r"^tuning: a stream without pictures has nothing to train"):
        train_stage(reasoner(words, "none"), Table(), CONVERSATIONS, StageConfig(device="cpu"))
    with pytest.raises(ValueError, match=r"^tuning: unknown name 'half'"):
        train_stage(reasoner(words), Table(), CONVERSATIONS, StageConfig(device="cpu"), tuning="half")


def test_the_paper_s_stages_have_its_steps():
    training = StageConfig().training(595_375)
    assert (training.steps, training.learning_rate, training.schedule) == (4652, 2e-3, "cosine")
    assert training.warmup == 140 and training.weight_decay == 0
