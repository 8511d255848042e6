"""What a run of the load generator is asked to do, checked; knows nothing of how it is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from bench.load.arrivals import Arrivals, require_positive
from bench.load.outcome import Slo

if TYPE_CHECKING:
    from collections.abc import Sequence

Endpoint = Literal["chat", "completions"]
DEFAULT_DURATION_S = 30.0
DEFAULT_SLO = Slo(ttft_s=1.0, tpot_s=0.05)


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ask, and how."""

    url: str  # scheme and authority, perhaps a path before /v1
    model: str | None = None  # None: the first one that the server names
    token: str | None = field(default=None, repr=False)
    endpoint: Endpoint = "chat"
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"url must begin with http:// or https:// and name a host, not {self.url!r}")
        if self.endpoint not in ("chat", "completions"):
            raise ValueError(f"endpoint must be chat or completions, not {self.endpoint!r}")
        require_positive("timeout", self.timeout_s)

    @property
    def base_url(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")


@dataclass(frozen=True, slots=True)
class Plan:
    """Exactly one of rates, concurrencies and trace says what load; one of duration_s and num_requests how much."""

    rates: tuple[float, ...] = ()  # open loop, requests per second
    concurrencies: tuple[int, ...] = ()  # closed loop, clients
    trace: str | None = None  # a file
    arrivals: Arrivals = Arrivals.POISSON
    burst_size: int = 8
    duration_s: float | None = None
    num_requests: int | None = None
    num_prompt_tokens: int = 512
    num_output_tokens: int = 128
    num_shared_tokens: int = 0
    speed: float = 1.0  # of the trace
    trace_scale: float = 1.0  # of its lengths
    num_warmup: int = 1
    seed: int = 0
    slo: Slo = DEFAULT_SLO

    def __post_init__(self) -> None:
        if [bool(self.rates), bool(self.concurrencies), self.trace is not None].count(True) != 1:
            raise ValueError("give exactly one of --rate, --concurrency and --trace")
        if self.duration_s is not None and self.num_requests is not None:
            raise ValueError("give --duration or --requests, not both")
        positive = {
            "burst-size": self.burst_size,
            "prompt-tokens": self.num_prompt_tokens,
            "output-tokens": self.num_output_tokens,
            "speed": self.speed,
            "trace-scale": self.trace_scale,
            "slo-ttft": self.slo.ttft_s,
            "slo-tpot": self.slo.tpot_s,
        }
        optional = {"duration": self.duration_s, "requests": self.num_requests}
        positive |= {name: value for name, value in optional.items() if value is not None}
        for name, value in positive.items():
            require_positive(name, value)
        for rate in self.rates:
            require_positive("rate", rate)
        for concurrency in self.concurrencies:
            require_positive("concurrency", concurrency)
        if not 0 <= self.num_shared_tokens <= self.num_prompt_tokens:
            raise ValueError(
                f"shared-prefix-tokens must be between 0 and prompt-tokens ({self.num_prompt_tokens}), "
                f"not {self.num_shared_tokens}"
            )
        if self.num_warmup < 0:
            raise ValueError(f"warmup must not be negative, but is {self.num_warmup}")

    @property
    def level_duration_s(self) -> float | None:
        """None where the number of requests ends a level, or the trace does."""
        if self.duration_s is None and self.num_requests is None and self.trace is None:
            return DEFAULT_DURATION_S
        return self.duration_s

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def parse_numbers(name: str, text: str) -> Sequence[float]:
    """'1,2,4'. ValueError names the part that is no number."""
    numbers = []
    for part in text.split(","):
        try:
            numbers.append(float(part))
        except ValueError:
            raise ValueError(f"{name} must be numbers with commas between them, not {part!r} in {text!r}") from None
    return numbers


def parse_rates(text: str) -> tuple[float, ...]:
    return tuple(parse_numbers("rate", text))


def parse_concurrencies(text: str) -> tuple[int, ...]:
    numbers = parse_numbers("concurrency", text)
    for number in numbers:
        if not float(number).is_integer():
            raise ValueError(f"concurrency must be whole numbers, not {number:g}")
    return tuple(int(number) for number in numbers)
