"""An OpenAI-compatible server, asked for one answer at a time. It may answer late, wrongly, or not at all.

Greedy (temperature 0). A timeout, a broken connection, a 429 and a 5xx are tried again, waiting longer each time or as long
as `Retry-After` says. The key comes from an environment variable and is in no message.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import ipaddress
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import ConfigError, LlmtuneError, UserError

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 120.0
LARGEST_REPLY = 8_000_000  # bytes
IN_A_ROW = 8
"""So many requests that failed one after the other are taken for a server that is down, and not for bad requests."""
AGAIN = {408, 425, 429}
REFUSED = {401: "it does not accept the key", 403: "it does not allow this", 404: "it knows no such address or model"}


class EndpointError(LlmtuneError):
    """One request came to nothing, after all its tries; another one may not."""


class EndpointRefused(UserError):
    """What every further request would meet, too: a wrong key, address or model, or a server that is down."""


@dataclass(frozen=True)
class Reply:
    """text: of the answer, or of the refusal where the server sets it apart. tokens: as the server counted them, None where it
    did not. ended: the model stopped by itself. latency_s: of the request that succeeded, without waiting."""

    text: str
    tokens: int | None
    ended: bool
    latency_s: float


class Endpoint:
    """`Endpoint(base_url, model).complete([{"role": "user", "content": "hello"}], max_tokens=64)`. Safe to share by threads."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        timeout_s: float = 60,
        retries: int = 4,
        place: Path | str = "endpoint",
    ) -> None:
        """api_key_env: the variable that holds the key. timeout_s: of one try. place: what stands before a message.

        Raises ConfigError when the variable is not set. Nothing is sent yet.
        """
        self.url, self.model = f"{base_url.rstrip('/')}/chat/completions", model
        self.timeout_s, self.retries, self.place = timeout_s, retries, place
        self._key = _key(api_key_env, place)
        handlers: list[Any] = [_NoRedirect]
        if _on_this_machine(base_url):  # a proxy between a machine and itself is never meant
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self._stopped, self._failures = threading.Event(), 0

    def complete(
        self, messages: list[dict[str, Any]], max_tokens: int, tools: list[dict[str, Any]] | None = None
    ) -> Reply:
        """The model's greedy answer; a call of one of the `tools` stands in its text as <tool_call>{"name", "arguments"}</tool_call>.

        Raises EndpointError for this request, EndpointRefused for what all of them would meet.
        """
        asked = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        if tools:
            asked["tools"] = tools
        wait = FIRST_WAIT_S
        for attempt in range(self.retries + 1):
            if self._stopped.is_set():
                raise EndpointError("was not sent, since asking was stopped")
            began = time.perf_counter()
            try:
                reply = _read(self._send(asked), time.perf_counter() - began)
            except _TryAgain as failure:
                if (failure.after_s or 0) > LONGEST_WAIT_S:
                    raise self._failed(f"{failure} and asks to wait {failure.after_s:.0f} s") from None
                if attempt == self.retries:
                    raise self._failed(f"{failure}, at try {attempt + 1}") from None
                self._stopped.wait(failure.after_s if failure.after_s is not None else wait)
                wait = min(2 * wait, LONGEST_WAIT_S)
            except _Useless as failure:  # an answer, if a useless one: the server is there
                self._failures = 0
                raise EndpointError(f"{self.url} {failure}") from None
            else:
                self._failures = 0
                return reply
        raise AssertionError("the last try returns or raises")

    def stop(self) -> None:
        """Requests that wait for their next try end now, in whatever thread."""
        self._stopped.set()

    def _send(self, asked: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "llmtune"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, json.dumps(asked).encode(), headers)  # noqa: S310 - checked in the config
        deadline = time.monotonic() + self.timeout_s
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                return _body(response, deadline)
        except urllib.error.HTTPError as error:
            said = ""
            with contextlib.suppress(OSError, http.client.HTTPException, _Useless):
                said = " ".join(self._hidden(_body(error, deadline).decode(errors="replace")).split())
            said = f" ({said[:200]})" if said else ""
            if error.code in AGAIN or error.code >= 500:
                raise _TryAgain(f"answered {error.code}{said}", _retry_after(error.headers)) from None
            if 300 <= error.code < 400:
                where = self._hidden(str(error.headers.get("Location")))
                raise EndpointRefused(f"{self.place}: {self.url} sends on to {where}; write that as base_url") from None
            if error.code in REFUSED:
                raise EndpointRefused(
                    f"{self.place}: {self.url} answered {error.code} for model '{self.model}': {REFUSED[error.code]}{said}"
                ) from None
            raise _Useless(f"answered {error.code}{said}") from None
        except TimeoutError:
            raise _TryAgain(f"did not answer within {self.timeout_s:g} s") from None
        except urllib.error.URLError as error:
            timed_out = isinstance(error.reason, TimeoutError)
            told = f"did not answer within {self.timeout_s:g} s" if timed_out else f"cannot be reached ({error.reason})"
            raise _TryAgain(told) from None
        except (OSError, http.client.HTTPException) as error:
            raise _TryAgain(f"broke off ({type(error).__name__})") from None

    def _failed(self, why: str) -> LlmtuneError:
        self._failures += 1
        told = f"{self.url} {why}"
        if self._failures < IN_A_ROW:
            return EndpointError(told)
        return EndpointRefused(f"{self.place}: {self._failures} requests in a row came to nothing; the last: {told}")

    def _hidden(self, text: str) -> str:
        """Servers repeat a wrong key in what they say about it."""
        return text.replace(self._key, "***") if self._key else text


class _TryAgain(Exception):
    def __init__(self, told: str, after_s: float | None = None) -> None:
        super().__init__(told)
        self.after_s = after_s


class _Useless(Exception):
    pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None: the key would go along to wherever the server says."""


def _key(variable: str | None, place: Path | str) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(place, f"api_key_env: the environment variable {variable} is not set")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(
            place, f"api_key_env: what {variable} holds cannot be a key: it has characters no header may have"
        )
    return key


def _on_this_machine(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _body(response: Any, deadline: float) -> bytes:
    """Read with a deadline for all of it: a timeout of the socket starts anew with every byte."""
    parts, size = [], 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if size > LARGEST_REPLY:
            raise _Useless(f"sent more than {LARGEST_REPLY:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts)


def _retry_after(headers: Any) -> float | None:
    """Seconds to wait, from a number or a date; None where nothing usable is said."""
    said = str(headers.get("Retry-After") or "").strip()
    with contextlib.suppress(ValueError):
        return max(0.0, float(said))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    return None


def _call(function: dict[str, Any]) -> str:
    """Arguments come as text that should be JSON; where a model wrote none, the text itself shows it."""
    arguments = function["arguments"]
    with contextlib.suppress(ValueError, TypeError):
        arguments = json.loads(arguments)
    return json.dumps({"name": function["name"], "arguments": arguments})


def _read(body: bytes, latency_s: float) -> Reply:
    try:
        whole = json.loads(body)
        choice = whole["choices"][0]
        message = choice["message"]
        text = message.get("content") or message.get("refusal") or ""
        for call in message.get("tool_calls") or []:
            text += f"<tool_call>{_call(call['function'])}</tool_call>"
        tokens = (whole.get("usage") or {}).get("completion_tokens")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _Useless(f"sent no chat completion but {body[:80]!r}") from None
    if not isinstance(text, str):
        raise _Useless("sent an answer that is no text")
    tokens = tokens if isinstance(tokens, int) and not isinstance(tokens, bool) else None
    return Reply(text, tokens, choice.get("finish_reason") != "length", latency_s)
