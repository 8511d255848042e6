"""Which placement policy, and its few settings. Decides nothing; refuses values that could never work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

PolicyName = Literal[
    "round_robin",
    "random",
    "least_loaded",
    "single_ring",
    "prefix_hash",
    "threshold",
    "min_ttft",
    "exploit_explore",
    "overlap_cost",
    "dual_map",
    "home_pair",
]


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """A setting that names policies concerns only these."""

    name: PolicyName = "home_pair"  # who chooses where a request is prefilled
    has_slo_switch: bool = True  # dual_map: off, the warm candidate is taken however late it would be
    num_sampled: int = 2  # home_pair: random workers that are candidates beside the pair
    remembers: bool = True  # home_pair: where the prompt that this one continues was placed is a candidate, too
    duplicate_cost: float = (
        30.0  # home_pair: of a second copy, times computing it, times how much of evicted KV is missed
    )
    pulls: bool = True  # home_pair, min_ttft, exploit_explore: estimates count on KV pulled from another worker
    load_factor: float = 1.25  # single_ring: how far above the mean load a worker may get
    num_prefix_blocks: int = 2  # prefix_hash: hash blocks that make the key
    min_match_share: float = 0.5  # threshold, exploit_explore: of the prompt, to be worth affinity
    max_imbalance_tokens: int = 32_768  # threshold: pending tokens between the most and the least loaded worker
    max_imbalance_ratio: float = 1.5  # threshold: both must be exceeded for the pool to count as unbalanced
    overlap_weight: float = 1.0  # overlap_cost: of a block to prefill, against a block that is held

    def __post_init__(self) -> None:
        names = get_args(PolicyName)
        if self.name not in names:
            raise ValueError(f"policy name must be one of {', '.join(names)}, got {self.name!r}")
        for name, least in (
            ("num_sampled", 0),
            ("load_factor", 1),
            ("num_prefix_blocks", 1),
            ("max_imbalance_tokens", 0),
            ("max_imbalance_ratio", 1),
            ("overlap_weight", 0),
            ("duplicate_cost", 0),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.min_match_share <= 1:
            raise ValueError(f"min_match_share must be in [0, 1], got {self.min_match_share}")
