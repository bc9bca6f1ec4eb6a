"""Language models that read a picture's vectors: conversations as tokens, batches, answers, and wrong models."""

import pytest
import small_language
import torch

from vaelab.models.language_model import IGNORED, PICTURE, LanguageModel, Turn, load_language_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: small_language.save(name, tmp_path_factory.mktemp(name)) for name in small_language.ARCHITECTURES}


@pytest.fixture(scope="module", params=small_language.ARCHITECTURES)
def language(request, folders):
    return load_language_model(str(folders[request.param]), device="cpu")


@pytest.fixture(scope="module")
def llama(folders):
    return load_language_model(str(folders["llama"]), device="cpu")


def text(language, segments):
    return [(one.kind, language.tokenizer.decode(one.tokens)) for one in segments]


def test_a_conversation_has_the_picture_first_and_learns_answers_with_their_ends(llama):
    turns = [Turn(f"{PICTURE}\nwhat colour is the star?", "red"), Turn("is there a ring?", "no")]
    assert text(llama, llama.segments(turns)) == [
        ("prompt", "<s> user :"),
        ("picture", ""),
        ("prompt", "what colour is the star ? assistant :"),
        ("answer", "red </s>"),
        ("prompt", "user : is there a ring ? assistant :"),
        ("answer", "no </s>"),
    ]
    assert text(llama, llama.segments(turns[:1], complete=False))[-1][1].endswith("? assistant :")


def test_labels_are_the_answers_and_pictures_take_their_places(llama):
    conversations = [
        llama.segments([Turn("where is the ring?", "on the left")]),
        llama.segments([Turn("what?", "red")]),
    ]
    pictures = torch.randn(2, 3, llama.width)
    batch = llama.assemble(conversations, pictures)
    places = [3, 3]  # after the begin token, "user" and ":"
    for row, place in enumerate(places):
        assert torch.equal(batch.embeddings[row, place : place + 3], pictures[row])
    learned = [row[row != IGNORED].tolist() for row in batch.labels]
    assert [llama.tokenizer.decode(row) for row in learned] == ["on the left </s>", "red </s>"]
    assert batch.mask.sum(1).tolist() == [sum(len(s.tokens) for s in row) + 3 for row in conversations]
    left = llama.assemble(conversations, pictures, left=True)
    assert left.mask[1].tolist() == batch.mask[1].flip(0).tolist()


def test_padding_changes_neither_loss_nor_answers(language):
    pictures = torch.randn(2, 4, language.width)
    short, long = [Turn("what is it?", "red")], [Turn("which thing is left of the small blue ring?", "a star")]
    each = [language.loss([language.segments(turns)], pictures[[i]]) for i, turns in enumerate((short, long))]
    together = language.loss([language.segments(short), language.segments(long)], pictures)
    assert torch.isclose(together, (2 * each[0] + 3 * each[1]) / 5, atol=1e-5)
    questions = [short[0].question, long[0].question]
    alone = [language.answer([question], pictures[[i]], 6)[0] for i, question in enumerate(questions)]
    assert language.answer(questions, pictures, 6) == alone


def test_an_answer_that_was_learned_is_given_and_depends_on_the_picture(folders):
    language = load_language_model(str(folders["llama"]), device="cpu")
    pictures, answers = torch.randn(2, 3, language.width), ["red", "a large star"]
    conversations = [language.segments([Turn("what is it?", answer)]) for answer in answers]
    optimizer = torch.optim.AdamW(language.model.parameters(), 3e-2)
    for _ in range(25):
        optimizer.zero_grad()
        language.loss(conversations, pictures).backward()
        optimizer.step()
    assert language.answer(["what is it?"] * 2, pictures, 8) == answers


def test_other_templates_can_be_given_by_name(tmp_path):
    folder = small_language.save("mpt", tmp_path, template=False)
    with pytest.raises(
        ValueError, match=r"^language_model: .* has no chat template; give chat_template: llava or chatml"
    ):
        load_language_model(str(folder), device="cpu")
    with pytest.raises(ValueError, match=r"^chat_template: unknown name 'lava'; .* llava"):
        load_language_model(str(folder), device="cpu", chat_template="lava")
    language = load_language_model(str(folder), device="cpu", chat_template="chatml")
    answer = language.segments([Turn("what?", "red")])[-1]
    assert answer.kind == "answer" and answer.tokens[-1] == language.tokenizer.eos_token_id


def test_a_template_that_loses_the_picture_or_the_order_is_refused(folders):
    language = load_language_model(str(folders["llama"]), device="cpu")
    language.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"^language_model: the chat template of 'small' must keep <image> once"):
        LanguageModel(language.model, language.tokenizer, "small")
    language.tokenizer.chat_template = (
        "{{ messages | length }}{{ messages[0]['content'] }}{{ messages[-1]['content'] }}"
    )
    changed = LanguageModel(language.model, language.tokenizer, "small")
    with pytest.raises(
        ValueError, match=r"^language_model: the chat template of 'small' does not write turns one after"
    ):
        changed.segments([Turn("what?", "red")])


def test_a_folder_without_a_language_model_is_refused(tmp_path, clip_folder):
    with pytest.raises(ValueError, match=r"^language_model: '.*' holds no causal language model"):
        load_language_model(str(clip_folder), device="cpu")
    with pytest.raises(ValueError, match=r"^language_model: 'nowhere' is neither a folder nor an id on the hub"):
        load_language_model("nowhere", device="cpu")
