"""Questions about pictures, asked of a real HTTP server and of a small local model."""

import base64
import email.utils
import io
import multiprocessing
import os
import signal
import threading
import time
import traceback

import pytest
from endpoint import KEY, completion, serving
from PIL import Image

from vaelab.models import vision_language
from vaelab.models.vision_language import Endpoint, Question, Reply, ask_all

QUICK = {"timeout": 0.3, "attempts": 3, "backoff": 0.01}


def png(colour="red", size=(8, 8)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def question(number=0):
    return Question("You name colours.", (f"Picture {number}:", png(), "Which colour?"))


def one_word(text):
    if len(text.split()) != 1:
        raise ValueError(f"The answer has {len(text.split())} words; one is allowed.")
    return text


def number_of(body):
    return int(body["messages"][1]["content"][0]["text"].split()[1][:-1])


def test_text_and_pictures_arrive_in_order_and_answers_return_in_order(monkeypatch, tmp_path):
    def respond(body, _):
        time.sleep(0.05 * (3 - number_of(body)))  # the first is answered last
        return 200, completion(f"red{number_of(body)}"), {}

    with serving(respond, monkeypatch) as requests:
        found = ask_all(Endpoint("seer", **QUICK), map(question, range(4)), one_word, tmp_path, progress=False)
    assert [answer.value for answer in found] == ["red0", "red1", "red2", "red3"]
    (body,) = [one for one in requests if number_of(one) == 0]
    assert body["model"] == "seer" and body["path"] == "/v1/chat/completions"
    assert body["headers"]["authorization"] == f"Bearer {KEY}"
    system, user = body["messages"]
    assert system == {"role": "system", "content": "You name colours."}
    assert [part["type"] for part in user["content"]] == ["text", "image_url", "text"]
    assert base64.b64decode(user["content"][1]["image_url"]["url"].removeprefix("data:image/png;base64,")) == png()


@pytest.mark.parametrize(
    "first",
    [
        (500, "no", {}),
        (429, {"error": {"message": "slow down"}}, {}),
        (200, "<html>", {}),
        (200, "<html>", {"content-type": "text/html"}),
        (200, {"choices": []}, {}),
        (200, completion(None), {}),
        (200, completion(""), {}),
        "timeout",
    ],
    ids=str,
)
def test_a_request_is_made_again(monkeypatch, first):
    gone = threading.Event()

    def respond(_, number):
        if number:
            return 200, completion("red"), {}
        if first == "timeout":
            gone.wait(5)
            return 200, completion("late"), {}
        return first

    with serving(respond, monkeypatch) as requests:
        assert Endpoint("seer", **QUICK).answer(question()) == "red"
        gone.set()
    assert len(requests) == 2


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_no_request_begins_before_the_time_that_the_server_gave(monkeypatch, tmp_path, kind):
    times, asked = [], {}

    def respond(_, number):
        times.append(time.time())
        if number == 0:
            asked["until"] = time.time() + 0.4 if kind == "seconds" else int(time.time()) + 1
            wait = "0.4" if kind == "seconds" else email.utils.formatdate(asked["until"], usegmt=True)
            return 429, {"error": {"message": "slow down"}}, {"retry-after": wait}
        return 200, completion("red"), {}

    with serving(respond, monkeypatch) as requests:
        model = Endpoint("seer", **QUICK)
        first = threading.Thread(target=model.answer, args=(question(0),))
        first.start()
        while not requests:
            time.sleep(0.005)
        time.sleep(0.1)
        ask_all(model, map(question, range(1, 4)), one_word, tmp_path, progress=False)
        first.join()
    assert len(times) == 5 and min(times[1:]) >= asked["until"] - 0.02


def test_a_server_that_asks_for_hours_ends_the_run(monkeypatch):
    with serving(lambda *_: (429, KEY, {"retry-after": "7200"}), monkeypatch) as requests:
        with pytest.raises(
            ValueError, match=r"^annotator: the endpoint asks to wait 7200 s; run again later"
        ) as caught:
            Endpoint("seer", parameter="annotator", **QUICK).answer(question())
        assert len(requests) == 1
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_requests_are_spaced_and_few_are_made_at_a_time(monkeypatch, tmp_path):
    lock, now, most, begins = threading.Lock(), [0], [0], []

    def respond(*_):
        with lock:
            begins.append(time.monotonic())
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.1)
        with lock:
            now[0] -= 1
        return 200, completion("red"), {}

    with serving(respond, monkeypatch):
        ask_all(Endpoint("seer", **QUICK), map(question, range(6)), one_word, tmp_path / "a", concurrency=2,
                progress=False)  # fmt: skip
        assert most == [2]
        begins.clear()
        spaced = Endpoint("seer", requests_per_minute=600, **QUICK)
        ask_all(spaced, map(question, range(4)), one_word, tmp_path / "b", concurrency=4, progress=False)
    assert begins[-1] - begins[0] > 0.27


def test_an_invalid_answer_is_sent_back_with_the_reason_and_nothing_is_asked_twice(monkeypatch, tmp_path):
    def respond(body, _):
        good = len(body["messages"]) > 2 or number_of(body) == 1
        if number_of(body) == 2:
            return 200, completion("never one word"), {}
        if number_of(body) == 3:
            return 400, {"error": {"message": f"not for {KEY}"}}, {}
        if number_of(body) == 4:
            return 200, completion(None, refusal="I may not"), {}
        return 200, completion("red" if good else "a red one"), {}

    with serving(respond, monkeypatch) as requests:
        model, asked = Endpoint("seer", **QUICK), [question(i) for i in (0, 1, 1, 2, 3, 4)]
        found = ask_all(model, asked, one_word, tmp_path, tries=2, progress=False)
        count = len(requests)
        again = ask_all(model, asked[:4], one_word, tmp_path, tries=2, progress=False)
        assert len(requests) == count == 2 + 1 + 2 + 1 + 1
        other = Endpoint("another", **QUICK)
        ask_all(other, asked[1:2], one_word, tmp_path, progress=False)
        assert len(requests) == count + 1  # another model's answers are others
    assert found[:4] == again and [answer.value for answer in found] == ["red", "red", "red", None, None, None]
    assert [answer.problem for answer in found[3:]] == [
        "no valid answer in 2: The answer has 3 words; one is allowed.",
        "the endpoint refused the question (400): not for ***",
        "the model refused: I may not",
    ]
    (objection,) = [body["messages"][2:] for body in requests if number_of(body) == 0 and len(body["messages"]) > 2]
    assert objection == [
        {"role": "assistant", "content": "a red one"},
        {
            "role": "user",
            "content": "The answer has 3 words; one is allowed. Please answer again in the requested form.",
        },
    ]
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, {"error": {"message": f"Incorrect key {KEY}"}}, r"seer: Incorrect key \*\*\* \(status 401\)"),
        (404, {"error": {"message": "no such model"}}, r"seer: no such model \(status 404\)"),
        (429, {"error": {"message": "no money", "code": "insufficient_quota"}}, r"seer: no money \(status 429\)"),
        (503, KEY, "seer: no answer after 3 attempts: "),
    ],
)
def test_what_concerns_all_questions_ends_the_run_and_hides_the_key(monkeypatch, tmp_path, status, body, message):
    with serving(lambda *_: (status, body, {}), monkeypatch) as requests:
        model = Endpoint("seer", parameter="annotator", **QUICK)
        with pytest.raises(ValueError, match=f"^annotator: {message}") as caught:
            ask_all(model, map(question, range(50)), one_word, tmp_path, concurrency=2, progress=False)
        assert len(requests) <= (6 if status == 503 else 3)
    shown = "".join(traceback.format_exception(caught.value))
    assert KEY not in shown and "127.0.0.1" not in shown


def test_after_a_kill_only_what_was_not_answered_is_asked(monkeypatch, tmp_path):
    stuck, killed = threading.Event(), threading.Event()
    answered = []

    def respond(body, _):
        if number_of(body) == 3 and not killed.is_set():
            stuck.set()
            killed.wait(10)
            return 500, "", {}
        answered.append(number_of(body))
        return 200, completion("red"), {}

    def annotate():
        return ask_all(
            Endpoint("seer", timeout=20), map(question, range(6)), one_word, tmp_path, concurrency=1, progress=False
        )

    with serving(respond, monkeypatch):
        child = multiprocessing.get_context("fork").Process(target=annotate)
        child.start()
        assert stuck.wait(20)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        killed.set()
        assert [answer.value for answer in annotate()] == ["red"] * 6
    assert child.exitcode == -signal.SIGKILL and sorted(answered) == list(range(6))


def test_an_estimate_counts_requests_pictures_and_tokens():
    asked = Question("x" * 40, ("y" * 60, png(size=(2016, 224)), png(size=(64, 64))))
    found = vision_language.estimate(asked, 10)
    tokens = 100 // 4 + (85 + 170 * 4) + (85 + 170)
    assert found == (10, 20, 10 * tokens)
    assert str(found) == "10 requests with 20 pictures, about 10,450 tokens"


def test_an_endpoint_needs_an_address_or_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match=r"^annotator: set OPENAI_API_KEY or, .* OPENAI_BASE_URL in the environment"):
        vision_language.load_model("endpoint:seer")
    with pytest.raises(ValueError, match=r"^annotator: 'no such' is neither a folder nor an id"):
        vision_language.load_model("no such")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert vision_language.load_model("endpoint:seer").name == "endpoint:seer"
    with pytest.raises(ValueError, match=r"^annotator: endpoint:seer .* no revision 'main'"):
        vision_language.load_model("endpoint:seer", revision="main")
    with pytest.raises(ValueError, match=r"^annotator: expected the name of a model after 'endpoint:'"):
        vision_language.load_model("endpoint:")


@pytest.fixture(scope="module")
def local_folder(tmp_path_factory):
    """Folder of a small LLaVA with random weights."""
    import torch
    import transformers
    from small_pipelines import SENTENCES
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("llava")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(special_tokens=["<pad>", "<s>", "</s>", "<image>"], initial_alphabet=alphabet,
                                       show_progress=False),
    )  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    sides = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    template = (
        "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    transformers.LlavaProcessor(
        sides, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=transformers.CLIPVisionConfig(image_size=16, patch_size=8, **size),
                text_config=transformers.LlamaConfig(vocab_size=len(tokenizer), **special, **size),
                image_token_id=3, vision_feature_layer=-1,
            )
        ).save_pretrained(folder)  # fmt: skip
    return folder


def test_a_local_model_sees_text_and_pictures(local_folder, tmp_path):
    model = vision_language.load_model(str(local_folder), device="cpu")
    model._longest = 8
    first = model.answer(question())
    inputs = model.processor(
        images=[Image.new("RGB", (8, 8), "red")],
        text="user: You name colours.Picture 0:<image>Which colour?", return_tensors="pt",
    )  # fmt: skip
    tokens = model.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert first == model.processor.decode(tokens, skip_special_tokens=True) and first
    other = Question("You name colours.", ("Picture 0:", png("blue"), "Which colour?"))
    assert model.answer(other) != first
    assert model.answer(question(), [Reply(first, "In one word.")]) != first
    (kept,) = ask_all(model, [question()], str, tmp_path, progress=False)
    assert kept.value == first
    (local_folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"^annotator: .*llava.* has no chat template"):
        vision_language.load_model(str(local_folder))
