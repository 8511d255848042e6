"""OpenAI's shape of an error, and which HTTP status says what. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from router.events import Fail
from router.validation import ContextExceeded, InvalidArgument

# gRPC's status of a Fail: HTTP status, type, code.
STATUSES = {
    "INVALID_ARGUMENT": (400, "invalid_request_error", "invalid_value"),
    "ALREADY_EXISTS": (409, "invalid_request_error", "request_id_in_flight"),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error", "rate_limit_exceeded"),
    "UNAVAILABLE": (503, "server_error", "service_unavailable"),
    "INTERNAL": (500, "server_error", "internal_error"),
}
# Where the field of a plain request is another one over HTTP.
PARAMS = (("sampling_params.", ""), ("chat.", ""), ("tokenized.input_ids", "prompt"), ("text", "prompt"))


@dataclass(eq=False)  # raised: the interpreter writes to it
class ApiError(Exception):
    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def of_fail(fail: Fail) -> ApiError:
    status, type_, code = STATUSES[fail.code]
    headers = {}
    if fail.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(fail.retry_after_s)))  # the header has whole seconds only
    return ApiError(status, type_, code, fail.message, headers=headers)


def of_invalid(error: InvalidArgument) -> ApiError:
    param = param_of(error.field)
    code = "context_length_exceeded" if isinstance(error, ContextExceeded) else "invalid_value"
    return ApiError(400, "invalid_request_error", code, f"{param}: {error.problem}", param)


def of_body(error: ValidationError) -> ApiError:
    """The first problem; of a union of types, the one that came nearest to a match: deepest in the body."""
    problem = max(error.errors(include_url=False), key=lambda problem: len(problem["loc"]))
    param = _path([part for part in problem["loc"] if not _is_branch(part)])
    if problem["type"] == "extra_forbidden":
        message = f"{param}: is not a parameter of this server, got {_short(problem['input'])}"
        return ApiError(400, "invalid_request_error", "unknown_parameter", message, param)
    if problem["type"] == "missing":
        message = f"{param}: must be set"
        return ApiError(400, "invalid_request_error", "missing_required_parameter", message, param)
    message = f"{param}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, got {_short(problem['input'])}"
    return ApiError(400, "invalid_request_error", "invalid_value", message, param)


def param_of(field_name: str) -> str:
    for ours, theirs in PARAMS:
        if field_name.startswith(ours):
            return theirs + field_name[len(ours) :]
    return field_name


def _is_branch(part: int | str) -> bool:
    """Pydantic names the branches of a union in a problem's place; no field of ours has such a name."""
    return (isinstance(part, str) and not part.isidentifier()) or part in ("str", "int", "float")


def _path(parts: list[int | str]) -> str:
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "body"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
