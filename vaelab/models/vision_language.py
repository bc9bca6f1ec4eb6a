"""Vision-language models: pictures and text in, text out, by an OpenAI-compatible endpoint or on this machine.

An endpoint is any server with OpenAI's chat completions, such as OpenAI's own, vLLM, or llama.cpp. Its address and key
are read from the environment variables ``OPENAI_BASE_URL`` and ``OPENAI_API_KEY``, and appear nowhere else.

Every answer is kept in a folder, by the content of its question. A run that was interrupted, or is made again, does not
ask a question whose answer is there.
"""

import email.utils
import hashlib
import io
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from vaelab.core import devices, hub
from vaelab.core.io import read_json, write_json
from vaelab.core.validate import at_least
from vaelab.models.checksums import checksum

ENDPOINT = "endpoint:"
"""Prefix of the names of models behind an endpoint."""
ADDRESS, KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"
"""Environment variables of an endpoint; a server without keys needs no key."""
LONGEST_BACKOFF = 60.0
"""Seconds between two attempts, at most, if the server does not say how long to wait."""
LONGEST_WAIT = 600.0
"""Seconds that the server may ask to wait; a server that asks for more ends the run."""
TRANSIENT = (408, 409, 429)
"""HTTP statuses below 500 after which a request is tried again."""
ONE_QUESTION = (400, 413, 422)
"""HTTP statuses that concern a single question, such as one that a content filter refuses."""
TOKEN_LETTERS = 4
"""Letters of a token in English, about."""


class Question(NamedTuple):
    """What a model is asked."""

    system: str
    """The model's role."""
    parts: tuple[str | bytes, ...]
    """Texts, and pictures as PNG files, in the order in which they are shown."""


class Reply(NamedTuple):
    """An invalid answer, and what the model was told about it."""

    answer: str
    objection: str


class Answer(NamedTuple):
    """What became of a question."""

    value: Any
    """The parsed answer; None if there is none."""
    problem: str = ""
    """Why there is none."""


class Unanswered(ValueError):
    """A model gave no answer to one question; other questions may be answered."""


class VisionLanguageModel(Protocol):
    """A model that answers questions about pictures."""

    name: str
    identity: dict[str, Any]
    """What determines the answers, besides the question."""
    concurrent: bool
    """Whether several questions may be asked at a time."""

    def answer(self, question: Question, earlier: Sequence[Reply] = ()) -> str:
        """Answer a question, given the invalid answers so far.

        Raises:
            Unanswered: the model gives no answer to this question.
            ValueError: the model cannot be asked.
        """


class Endpoint:
    """A model behind an OpenAI-compatible endpoint."""

    concurrent = True

    def __init__(
        self, model: str, *, timeout: float = 120.0, attempts: int = 6, backoff: float = 1.0,
        requests_per_minute: int = 0, parameter: str = "endpoint",
    ):  # fmt: skip
        """Read address and key from the environment; nothing is asked yet.

        Args:
            model: the model's name at the endpoint.
            timeout: seconds until a request counts as lost.
            attempts: how often a request is made before the run ends with an error.
            backoff: seconds before the second attempt; they double with each, and a random share of them is waited.
            requests_per_minute: the largest number of requests that begin in a minute; 0 means no limit.
            parameter: the notebook parameter that gave the model; errors begin with it.

        Raises:
            ValueError: neither an address nor a key is set, or a number is out of range.
        """
        import openai

        self._address, key = os.environ.get(ADDRESS, ""), os.environ.get(KEY, "")
        if not model:
            raise ValueError(f"{parameter}: expected the name of a model after {ENDPOINT!r}")
        if not self._address and not key:
            raise ValueError(f"{parameter}: set {KEY} or, for a server without keys, {ADDRESS} in the environment")
        at_least("attempts", attempts, 1)
        at_least("timeout", timeout, 0, exclusive=True)
        at_least("requests_per_minute", requests_per_minute, 0)
        self.name, self.identity = f"{ENDPOINT}{model}", {"model": model}
        self._model, self._secrets, self._parameter = model, [one for one in (key, self._address) if one], parameter
        self._attempts, self._backoff = attempts, backoff
        self._gate = _Gate(requests_per_minute)
        self._client = openai.OpenAI(
            api_key=key or "none", base_url=self._address or None, timeout=timeout, max_retries=0
        )

    def answer(self, question: Question, earlier: Sequence[Reply] = ()) -> str:
        """Ask the endpoint. A request is made again after a timeout, a lost connection, a malformed response, and the
        statuses 408, 409, 429 and from 500 on. The header Retry-After is honoured by all requests of this object.

        Raises:
            Unanswered: the endpoint refuses this question.
            ValueError: no attempt succeeded, or the key, the model or the quota is refused; the message holds neither
                key nor address.
        """
        import openai
        import tenacity

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._attempts), wait=self._seconds_to_wait,
            retry=tenacity.retry_if_exception(_is_transient), reraise=True,
        )  # fmt: skip
        try:
            return retrying(self._request, _messages(question, earlier))
        except (openai.OpenAIError, _MalformedResponse) as error:
            failure = self._explain(error)
        raise failure  # outside of the clause, so that the traceback does not show the server's words

    def _request(self, messages: list[dict[str, Any]]) -> str:
        import openai

        self._gate.enter()
        try:
            response = self._client.chat.completions.create(model=self._model, messages=messages)
        except openai.APIResponseValidationError as error:
            raise _MalformedResponse("its response was not JSON") from error
        except json.JSONDecodeError as error:
            raise _MalformedResponse("its response was not JSON") from error
        choices = getattr(response, "choices", None)  # a response that is not JSON comes back as text
        if not choices or choices[0].message is None:
            raise _MalformedResponse("its response had no answer")
        message = choices[0].message
        if getattr(message, "refusal", None):
            raise Unanswered(f"the model refused: {self._hide(message.refusal)}")
        if not isinstance(message.content, str) or not message.content.strip():
            raise _MalformedResponse("its answer was empty")
        return self._hide(message.content)

    def _seconds_to_wait(self, state: Any) -> float:
        """Return the seconds until the next attempt; let all requests wait as long as the server asks."""
        error = state.outcome.exception()
        asked = _retry_after(getattr(getattr(error, "response", None), "headers", {}))
        if asked is None:
            import tenacity

            return tenacity.wait_random_exponential(self._backoff, LONGEST_BACKOFF)(state)
        if asked > LONGEST_WAIT:
            raise ValueError(f"{self._parameter}: the endpoint asks to wait {asked:.0f} s; run again later")
        self._gate.close(asked)
        return 0.0

    def _explain(self, error: Exception) -> ValueError:
        status, body = getattr(error, "status_code", None), getattr(error, "body", None)
        said = body.get("message") if isinstance(body, dict) else None
        said = self._hide(str(said or getattr(error, "message", "") or error)).strip().rstrip(".")
        if status in ONE_QUESTION:
            return Unanswered(f"the endpoint refused the question ({status}): {said}")
        said = f"{said} (status {status})" if status else said
        if _is_transient(error):
            said = f"no answer after {self._attempts} attempts: {said}; run again to continue"
        return ValueError(f"{self._parameter}: {self._model}: {said}")

    def _hide(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class LocalModel:
    """A vision-language model of transformers, with greedy decoding."""

    concurrent = False

    def __init__(self, model: Any, processor: Any, name: str, identity: dict[str, Any], longest: int = 1000):
        """Take a loaded model.

        Args:
            model: of the class that ``transformers.AutoModelForImageTextToText`` chooses.
            processor: its processor, with a chat template.
            name: the name under which results mention the model.
            identity: what identifies its weights.
            longest: the number of tokens after which an answer is cut.
        """
        self.model, self.processor, self.name = model.eval(), processor, name
        self.identity, self._longest = {**identity, "longest": longest}, longest

    def answer(self, question: Question, earlier: Sequence[Reply] = ()) -> str:
        """Answer a question."""
        import torch

        inputs = self.processor.apply_chat_template(
            self.messages(question, earlier), add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)  # fmt: skip
        with torch.no_grad():
            tokens = self.model.generate(**inputs, max_new_tokens=self._longest, do_sample=False)
        return self.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    @staticmethod
    def messages(question: Question, earlier: Sequence[Reply] = ()) -> list[dict[str, Any]]:
        """Arrange a question as a conversation. The system's text begins the user's, since not every chat template has
        a system role."""
        from PIL import Image

        parts: list[dict[str, Any]] = [{"type": "text", "text": question.system}]
        for part in question.parts:
            picture = isinstance(part, bytes)
            parts.append(
                {"type": "image", "image": Image.open(io.BytesIO(part))} if picture else {"type": "text", "text": part}
            )
        found = [{"role": "user", "content": parts}]
        for reply in earlier:
            found.append({"role": "assistant", "content": [{"type": "text", "text": reply.answer}]})
            found.append({"role": "user", "content": [{"type": "text", "text": reply.objection}]})
        return found


def load_model(
    name: str, *, device: str = "auto", revision: str | None = None, parameter: str = "annotator", **options: Any
) -> VisionLanguageModel:
    """Load a vision-language model.

    Args:
        name: ``endpoint:`` and a model's name there; or an id on the hub or a folder of a transformers model.
        device: the device of a local model.
        revision: the revision of a local model on the hub.
        parameter: the notebook parameter that gave the name; errors begin with it.
        options: further arguments of :class:`Endpoint`; a local model does not need them.

    Raises:
        ValueError: the environment names no endpoint; or there is no such folder or id, or it holds no
            vision-language model with a chat template.
    """
    if name.startswith(ENDPOINT):
        if revision:
            raise ValueError(f"{parameter}: {name} is behind an endpoint, so it has no revision {revision!r}")
        return Endpoint(name.removeprefix(ENDPOINT), parameter=parameter, **options)
    files = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
    folder = hub.find_folder(name, revision=revision, files=files, parameter=parameter)
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{parameter}: {name!r} holds no vision-language model ({error})") from error
    if report["missing_keys"]:  # transformers only logs this, and fills them with random numbers
        raise ValueError(f"{parameter}: {name!r} lacks {len(report['missing_keys'])} of the model's weights")
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{parameter}: {name!r} has no chat template")
    weights = {file.name: checksum(file) for file in sorted(folder.glob("*.safetensors"))}
    return LocalModel(model.to(devices.pick(device)), processor, Path(name).name, {"weights": weights})


class Estimate(NamedTuple):
    """What asking will take at most."""

    requests: int
    pictures: int
    tokens: int
    """Tokens of the questions, about; a model's own count may differ."""

    def __str__(self) -> str:
        return f"{self.requests:,} requests with {self.pictures:,} pictures, about {self.tokens:,} tokens"


def estimate(question: Question, count: int) -> Estimate:
    """Estimate what ``count`` questions like this one take, if each is answered at once and none was asked before.

    A picture's tokens are those of OpenAI's rule for high detail, 85 and 170 per tile of 512 x 512 pixels.
    """
    pictures = [part for part in question.parts if isinstance(part, bytes)]
    letters = len(question.system) + sum(len(part) for part in question.parts if isinstance(part, str))
    tokens = letters // TOKEN_LETTERS + sum(map(_picture_tokens, pictures))
    return Estimate(count, count * len(pictures), count * tokens)


def ask_all(
    model: VisionLanguageModel, questions: Iterable[Question], parse: Callable[[str], Any], folder: str | Path, *,
    concurrency: int = 4, tries: int = 3, total: int | None = None, progress: bool = True,
) -> list[Answer]:  # fmt: skip
    """Ask a model many questions, a few at a time.

    A question is made when it is its turn, so that the pictures of all of them need not fit in memory. Equal questions
    are asked once. An answer that ``parse`` refuses is sent back with the reason.

    Args:
        model: the model.
        questions: the questions.
        parse: turns an answer's text into its value; raises ValueError, with a sentence for the model, if the answer
            does not have the requested form.
        folder: the folder of all answers.
        concurrency: how many questions are asked at a time.
        tries: how often a model may answer a question.
        total: the number of questions, for the progress bar.
        progress: whether to show one.

    Returns:
        One answer per question, in their order.

    Raises:
        ValueError: the model cannot be asked; the answers so far are kept.
    """
    at_least("concurrency", concurrency, 1)
    at_least("tries", tries, 1)
    kept, futures = _Answers(Path(folder), model), []
    by_key: dict[str, Future] = {}
    running: set[Future] = set()
    bar = tqdm(desc="answers", total=total, disable=not progress, file=sys.stdout, mininterval=2, ncols=100)
    pool = ThreadPoolExecutor(concurrency if model.concurrent else 1)
    try:
        for question in questions:
            key = kept.key(question)
            if key not in by_key:
                if len(running) >= concurrency:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()  # an error ends the run here, not after all questions
                by_key[key] = pool.submit(_ask, kept, question, parse, tries)
                running.add(by_key[key])
            futures.append(by_key[key])
            by_key[key].add_done_callback(lambda _: bar.update())
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def _ask(kept: "_Answers", question: Question, parse: Callable[[str], Any], tries: int) -> Answer:
    """Ask a question until its answer is valid."""
    earlier: list[Reply] = []
    for _ in range(tries):
        try:
            text = kept.answer(question, earlier)
        except Unanswered as error:
            return Answer(None, str(error))
        try:
            return Answer(parse(text))
        except ValueError as error:
            problem = f"no valid answer in {tries}: {error}"
            earlier.append(Reply(text, f"{error} Please answer again in the requested form."))
    return Answer(None, problem)


class _Answers:
    """The answers of one model, in a folder."""

    def __init__(self, folder: Path, model: VisionLanguageModel):
        self._folder, self._model = folder, model

    def key(self, question: Question, earlier: Sequence[Reply] = ()) -> str:
        """Compute the name of an answer's file: the SHA-256 of model, question and earlier replies."""
        parts = [
            f"picture {hashlib.sha256(part).hexdigest()}" if isinstance(part, bytes) else f"text {part}"
            for part in question.parts
        ]
        whole = [self._model.identity, question.system, parts, [list(reply) for reply in earlier]]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def answer(self, question: Question, earlier: Sequence[Reply]) -> str:
        """Read an answer, or ask for it and keep it before anything else is done."""
        key = self.key(question, earlier)
        path = self._folder / key[:2] / f"{key}.json"
        if path.is_file():
            return read_json(path)["answer"]
        text = self._model.answer(question, earlier)
        write_json(path, {"model": self._model.name, "answer": text})
        return text


class _MalformedResponse(Exception):
    """A response that is not what the protocol promises."""


class _Gate:
    """Lets requests begin one after another, not before a time that the server gave, and not above a rate."""

    def __init__(self, per_minute: int):
        self._apart = 60 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def enter(self) -> None:
        """Wait until a request may begin."""
        while True:
            with self._lock:
                ahead = self._next - time.monotonic()
                if ahead <= 0:
                    self._next = time.monotonic() + self._apart
                    return
            time.sleep(ahead)

    def close(self, seconds: float) -> None:
        """Let no request begin for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _is_transient(error: BaseException) -> bool:
    import openai

    status = getattr(error, "status_code", None)
    if getattr(error, "code", None) == "insufficient_quota":
        return False
    lost = isinstance(error, openai.APIConnectionError | _MalformedResponse)
    return lost or (status is not None and (status in TRANSIENT or status >= 500))


def _retry_after(headers: Any) -> float | None:
    """Read the header Retry-After, seconds or a date; None if it is missing or not understood."""
    value = headers.get("retry-after") if headers else None
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _messages(question: Question, earlier: Sequence[Reply]) -> list[dict[str, Any]]:
    """Arrange a question as the messages of a chat completion."""
    import base64

    parts: list[dict[str, Any]] = []
    for part in question.parts:
        if isinstance(part, bytes):
            url = f"data:image/png;base64,{base64.b64encode(part).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        else:
            parts.append({"type": "text", "text": part})
    found = [{"role": "system", "content": question.system}, {"role": "user", "content": parts}]
    for reply in earlier:
        found += [{"role": "assistant", "content": reply.answer}, {"role": "user", "content": reply.objection}]
    return found


def _picture_tokens(png: bytes) -> int:
    """Count a picture's tokens: it is fitted in 2,048 x 2,048 pixels, and its shorter side in 768."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        width, height = picture.size
    scale = min(1.0, 2048 / max(width, height))
    scale = min(scale, 768 / min(width, height))
    return 85 + 170 * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)
