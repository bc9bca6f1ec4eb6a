"""The embedded text encoder: its tokenizer, its labels, its loss, and that it learns."""

import os
import subprocess
import sys

import pytest
import torch

from vaelab import world
from vaelab.embedded import text_encoder
from vaelab.embedded.text_encoder import UNNAMED, ReadingObjective
from vaelab.training.loop import TrainConfig, train
from vaelab.world.scenes import Scene, Thing


@pytest.fixture(scope="module")
def tokenizer():
    return text_encoder.new_tokenizer()


def test_the_tokenizer_has_a_token_for_every_word(tokenizer):
    for seed in range(200):
        prompt = world.sample(seed).prompt
        tokens = text_encoder.tokenize(tokenizer, [prompt])[0]
        words = prompt.replace(",", " ,").split()
        assert tokens[0] == tokenizer.bos_token_id and tokens[len(words) + 1] == tokenizer.eos_token_id
        assert tokenizer.convert_ids_to_tokens(tokens[1 : len(words) + 1]) == [f"{w}</w>" for w in words]
        assert len(tokens) == text_encoder.MAX_TOKENS


def test_the_tokenizer_is_the_same_in_every_process(tokenizer):
    script = "from vaelab.embedded import text_encoder; print(sorted(text_encoder.new_tokenizer().get_vocab().items()))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines()[-1] == str(sorted(tokenizer.get_vocab().items()))


def scene(*things, named=("texture", "ground")):
    return Scene(things, "dotted", "teal", named)


def test_what_a_prompt_says_of_each_place():
    star = Thing("star", "red", "large", "left", named=("shape", "size", "position"))
    labels = text_encoder.prompt_labels([scene(star, named=("ground",))])
    place, nothing = list(world.POSITIONS).index("left"), len(world.SHAPES)
    for i in range(9):
        expected = [world.SHAPES.index("star"), UNNAMED, 0] if i == place else [nothing, UNNAMED, UNNAMED]
        assert labels["positions"][0, i].tolist() == expected
    assert labels["ground"].tolist() == [[UNNAMED, list(world.GROUNDS).index("teal")]]


def test_a_thing_without_a_place_leaves_every_place_open():
    somewhere = Thing("ring", "blue", "small", "top", named=("shape", "colour", "size"))
    placed = Thing("star", "red", "large", "bottom")
    labels = text_encoder.prompt_labels([scene(somewhere, placed)])["positions"][0]
    there = list(world.POSITIONS).index("bottom")
    assert labels[there].tolist() == [world.SHAPES.index("star"), list(world.COLOURS).index("red"), 0]
    assert (labels[[i for i in range(9) if i != there]] == UNNAMED).all()


def test_the_loss_is_the_sum_of_the_mean_cross_entropies(tokenizer):
    objective = ReadingObjective(text_encoder.new_text_encoder(tokenizer, 32, 1)).eval()
    batch = next(text_encoder.prompt_batches(6, tokenizer)())
    states = objective.text_encoder(batch["tokens"])[0]
    found = objective.attention(objective.queries.expand(6, -1, -1), states, states)[0]
    scores = torch.cat([objective.position_head(found[:, :9]), torch.zeros(6, 9, 0)], -1).double()
    expected, right, said = 0.0, 0, 0
    for name, answers, truths in (
        ("positions", scores.split([9, 8, 2], -1), batch["positions"].unbind(-1)),
        ("ground", objective.ground_head(found[:, 9]).double().split([5, 4], -1), batch["ground"].unbind(-1)),
    ):
        for answer, truth in zip(answers, truths, strict=True):
            terms = [
                -answer[index].log_softmax(-1)[truth[index]]
                for index in map(tuple, (truth != UNNAMED).nonzero().tolist())
            ]
            expected += sum(terms) / len(terms)
            hits = answer.argmax(-1) == truth
            right, said = right + int(hits.sum()), said + len(terms)
        assert name in batch
    with torch.no_grad():
        got = objective(batch)
    assert float(got["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(got["accuracy"]) == pytest.approx(right / said)


def test_it_learns_to_read(tokenizer):
    objective = ReadingObjective(text_encoder.new_text_encoder(tokenizer, 64, 1))
    config = TrainConfig(steps=60, learning_rate=3e-3, device="cpu", log_every=1)
    history = train(objective, text_encoder.prompt_batches(32, tokenizer), config).history
    # chance is a loss of log 9 + log 8 + log 2 + log 5 + log 4, that is 8.0
    assert 7 < history[0]["loss"] < 9 and history[0]["accuracy"] < 0.3
    assert history[-1]["loss"] < 4 and history[-1]["accuracy"] > 0.7


def test_ranks_share_one_stream(tokenizer):
    alone = text_encoder.prompt_batches(2, tokenizer)()
    four = [next(alone)["tokens"] for _ in range(4)]
    assert torch.equal(next(text_encoder.prompt_batches(2, tokenizer)(start=1, rank=1, world=2))["tokens"], four[3])


def test_a_prompt_that_does_not_fit_is_refused_and_not_cut(tokenizer):
    fits = " ".join(["star"] * (text_encoder.MAX_TOKENS - 2))
    assert text_encoder.tokenize(tokenizer, ["star", fits]).shape == (2, text_encoder.MAX_TOKENS)
    with pytest.raises(ValueError, match="has 41 tokens; the tokenizer takes up to 40"):
        text_encoder.tokenize(tokenizer, ["star", f"{fits} star"])
