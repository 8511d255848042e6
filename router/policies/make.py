"""From settings to a policy."""

from __future__ import annotations

from typing import assert_never

from router.policies.base import PlacementPolicy
from router.policies.by_hash import PrefixHash, SingleRing
from router.policies.by_load import LeastLoaded, Random, RoundRobin
from router.policies.config import PolicyConfig
from router.policies.dual_map import DualMap
from router.policies.global_view import ExploitExplore, MinTtft, OverlapCost, Threshold
from router.policies.home_pair import HomePair


def make_policy(config: PolicyConfig, ttft_slo_s: float, block_size: int) -> PlacementPolicy:
    """block_size: tokens of a KV block."""
    match config.name:
        case "round_robin":
            return RoundRobin()
        case "random":
            return Random()
        case "least_loaded":
            return LeastLoaded()
        case "single_ring":
            return SingleRing(config.load_factor)
        case "prefix_hash":
            return PrefixHash(config.num_prefix_blocks)
        case "threshold":
            return Threshold(config.min_match_share, config.max_imbalance_tokens, config.max_imbalance_ratio)
        case "min_ttft":
            return MinTtft(config.pulls)
        case "exploit_explore":
            return ExploitExplore(config.min_match_share, config.pulls)
        case "overlap_cost":
            return OverlapCost(config.overlap_weight, block_size)
        case "dual_map":
            return DualMap(ttft_slo_s, config.has_slo_switch)
        case "home_pair":
            return HomePair(config.num_sampled, config.pulls, config.remembers, config.duplicate_cost)
    assert_never(config.name)
