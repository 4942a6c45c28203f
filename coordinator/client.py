"""How a command reaches the coordinator that runs in a state directory: over HTTP, with what its `service.json` says."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.http import SERVICE_FILE

_TIMEOUT_S = 2.0
_LONG_TIMEOUT_S = 30.0


class AwayError(Exception):
    """No coordinator answers; the message says where it was looked for."""


class RefusedError(Exception):
    """The coordinator answers, and does not do it; or what it left may not be read. The message says why."""


@dataclass(frozen=True)
class Running:
    """A running coordinator.

    Attributes:
        url: where it serves.
        token: that changes need; empty where it is not known.
    """

    url: str
    token: str = field(default="", repr=False)

    @classmethod
    def find(cls, state_dir: Path) -> Running:
        """The one that runs in this directory, as it says itself.

        Raises:
            AwayError: none has said so; one that did may have died since.
            RefusedError: this user may not know.
        """
        file = state_dir / SERVICE_FILE
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            return cls(str(said["url"]), str(said.get("token", "")))
        except PermissionError:
            raise RefusedError(f"{file} may be read by its owner alone: run this as the coordinator's user") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise AwayError(f"no coordinator is running in {state_dir}") from None

    def get(self, path: str) -> Any:
        """What it answers, of JSON.

        Raises:
            AwayError: it does not answer.
            RefusedError: it has no such thing.
        """
        return self._ask(self._request(path), _TIMEOUT_S)

    def post(self, path: str) -> Any:
        """Have it change something; see `get`."""
        return self._ask(self._request(path, method="POST"), _LONG_TIMEOUT_S)

    def lines(self, path: str) -> Iterator[bytes]:
        """What it goes on telling, a line each, until it has no more to tell.

        Raises:
            AwayError: it does not answer, or not any more.
            RefusedError: it has no such thing.
        """
        try:
            with urllib.request.urlopen(self._request(path), timeout=_LONG_TIMEOUT_S) as answer:  # noqa: S310  see _request
                yield from answer
        except urllib.error.HTTPError as error:
            raise RefusedError(_reason(error)) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._away(error) from None

    def _request(self, path: str, method: str = "GET") -> urllib.request.Request:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        url = self.url.rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise RefusedError(f"{self.url}: expected http:// or https://, then host and port")
        return urllib.request.Request(url + path, method=method, headers=headers)  # noqa: S310  checked right above

    def _ask(self, request: urllib.request.Request, timeout_s: float) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310  see _request
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RefusedError(_reason(error)) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._away(error) from None

    def _away(self, error: Exception) -> AwayError:
        reason = getattr(error, "reason", error)
        return AwayError(f"{self.url} does not answer: {getattr(reason, 'strerror', None) or reason}")


def _reason(error: urllib.error.HTTPError) -> str:
    """What an answer that is no success says, in words."""
    try:
        said = json.load(error)
        return str(said.get("error") or said.get("text") or said)
    except (OSError, ValueError, AttributeError):
        return f"{error.code} {error.reason}"
