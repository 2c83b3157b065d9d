"""A service without models, tokenizers of single bytes, and clients of the application over them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from eft_serve.api.app import create_app
from eft_serve.api.prompts import PromptRenderer
from eft_serve.config import AppConfig
from eft_serve.errors import UnavailableError
from eft_serve.types import Delta, FinishReason, GenerationRequest

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MODELS = ("large", "small", "small-chat")
Answer = Callable[[GenerationRequest], Iterable[Delta | Exception]]


def save_tokenizer(path: Path, *, template: str | None = CHAT_TEMPLATE, extra_tokens: Iterable[str] = ()) -> Path:
    """A tokenizer of single bytes that begins every text with `<s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", *alphabet, *extra_tokens])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


def make_config(tmp_path: Path, template: str = CHAT_TEMPLATE, **server: Any) -> AppConfig:
    """Three models, two recipes; the large one has no chat template."""
    paths = {m: save_tokenizer(tmp_path / m, template=None if m == "large" else template) for m in MODELS}
    tuned = [{"model": "small-chat"}]
    return AppConfig.parse(
        {
            "models": {m: {"path": str(p)} for m, p in paths.items()},
            "recipes": {
                "up": {"base": "large", "reference": "small", "tuned": tuned},
                "down": {"base": "small", "reference": "large", "tuned": tuned, "bounds": {"scale": [0, 2]}},
            },
            "server": server,
        }
    )


def deltas(*texts: str, finish: FinishReason = FinishReason.STOP) -> list[Delta]:
    """One token a character; the last delta carries the finish reason."""
    last = len(texts) - 1
    return [
        Delta(text=t, token_ids=[ord(c) for c in t], finish_reason=finish if i == last else None)
        for i, t in enumerate(texts)
    ]


class FakeService:
    """Answers from a script; remembers what was asked and what was given up."""

    def __init__(self, config: AppConfig, answer: Answer | None = None, *, pause_s: float = 0.0) -> None:
        self._config = config
        self.answer: Answer = answer or (lambda _: deltas("Hel", "lo"))
        self.pause_s = pause_s
        self.requests: list[GenerationRequest] = []
        self.num_running = 0
        self.num_closed_early = 0
        self.context_length = 512
        self.missing: str | None = None
        self.first_delta_sent = asyncio.Event()

    @property
    def config(self) -> AppConfig:
        return self._config

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        self.num_running += 1
        done = False
        try:
            for item in self.answer(request):
                await asyncio.sleep(self.pause_s)
                if isinstance(item, Exception):
                    done = True
                    raise item
                done = item.finish_reason is not None
                self.first_delta_sent.set()
                yield item
            if not done:
                await asyncio.Event().wait()
        finally:
            self.num_running -= 1
            self.num_closed_early += not done

    async def check_ready(self) -> None:
        if self.missing:
            raise UnavailableError(f"model {self.missing!r} has no replica")

    async def metrics(self) -> bytes:
        return b"eft_engine_steps_total 3.0\n"

    def max_model_len(self, model: str) -> int:
        return self.context_length


class Stack:
    """The application over a fake service, and a client on loopback."""

    def __init__(self, config: AppConfig, answer: Answer | None = None, *, pause_s: float = 0.0) -> None:
        self.service = FakeService(config, answer, pause_s=pause_s)
        self.registry = CollectorRegistry()
        renderer = PromptRenderer.load(config, self.service.max_model_len)
        self.app: FastAPI = create_app(self.service, renderer, self.registry)

    def client(self, peer: str = "127.0.0.1", **kwargs: Any) -> httpx.AsyncClient:
        """A client as seen from `peer`."""
        transport = httpx.ASGITransport(self.app, client=(peer, 1234))
        return httpx.AsyncClient(transport=transport, **({"base_url": "http://localhost:8000"} | kwargs))

    def openai(self, key: str = "none", peer: str = "127.0.0.1", host: str = "localhost") -> openai.AsyncOpenAI:
        """OpenAI's own client, as seen from `peer`; it never retries."""
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(self.app, client=(peer, 1234)))
        return openai.AsyncOpenAI(api_key=key, base_url=f"http://{host}/v1", http_client=http, max_retries=0)

    def metric(self, name: str, **labels: str) -> float | None:
        """One sample of the registry."""
        return self.registry.get_sample_value(name, labels)


def chat(**fields: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": "up", "messages": [{"role": "user", "content": "hi"}], **fields}


def events(response: httpx.Response) -> list[Any]:
    """The JSON of each event; `[DONE]` stays a string."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Connection:
    """One HTTP request spoken in raw ASGI, so that a test decides when the client goes away or stops reading."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._app = app
        raw = [(k.encode(), v.encode()) for k, v in (headers or {}).items()]
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json"), *raw],
            "client": ("127.0.0.1", 1234),
            "server": ("127.0.0.1", 8000),
        }
        self._body = json.dumps(body).encode()
        self._sent_body = False
        self.gone = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self.messages: list[Any] = []

    async def run(self) -> None:
        await self._app(self._scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if not self._sent_body:
            self._sent_body = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reading.wait()
        self.messages.append(message)
