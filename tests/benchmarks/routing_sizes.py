"""Memory and build time of a router of many domains over a large vocabulary, from made-up statistics."""

import time
from statistics import median
from typing import Any

import product_router as product

VOCABULARY = 152_000
DOMAINS = 100
TOKENS, PAIRS = 10_000, 30_000  # distinct, of a domain
ROUNDS = 5


def measure_sizes(width: int, domains: int) -> list[dict[str, Any]]:
    """Return the bytes of the router and of the packs' counts, and the median time of building it."""
    parts = [product.made_up_domain(VOCABULARY, width, tokens=TOKENS, pairs=PAIRS, seed=i) for i in range(domains + 1)]
    router = product.compose(parts, width)
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        product.compose(parts, width)
        seconds.append(time.perf_counter() - began)
    kept, counts = product.router_bytes(router), product.count_bytes(parts)
    return [
        {
            "domains": domains,
            "vocabulary": VOCABULARY,
            "router MB": kept / 1e6,
            "packs' counts MB": counts / 1e6,
            "beyond MB": (kept - counts) / 1e6,
            "build s": median(seconds),
        }
    ]
