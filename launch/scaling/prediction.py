"""What a step takes on any number of GPUs, from what was measured on one worker, what was counted, and a network.

    seconds of one worker, FLOPs, bytes ──▶ [prediction] ──▶ step time and efficiency at R GPUs

Everything here is arithmetic. What it takes for granted stands in ASSUMPTIONS, which the benchmark prints.

b = images of a GPU, B = of the global batch, N = identities, R = GPUs
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

ASSUMPTIONS = (
    "a worker's step is fixed_s + image_s x b + pair_s x b x B + logit_s x B / R + table_s / R: a constant, its "
    "images, their comparisons with the batch, the batch's logits against its identities, Adam's pass over its rows; "
    "the first three are fitted to two local batches with few identities, the last two are what N identities add; "
    "FLOPs counted on one worker tell how the time is parted",
    "with --tflops and --memory-gb-s the same FLOPs and bytes of memory take the time that such a GPU needs, and "
    "fixed_s is 0",
    "a rank sends (R-1)/R x (payload + payload_per_image x B) bytes a step, fitted to counts at B and 2 B on 2 ranks: "
    "gradients and parameters of what is replicated do not grow with B, features of the batch do",
    "every collective takes its bytes over the bandwidth, and the latency ceil(log2 R) times, an all-reduce twice that",
    "all GPUs have the same network, each its own link of full bandwidth; no node has a faster one inside",
    "efficiency: nothing that crosses the network is hidden behind computation; efficiency_overlapped: all that can be",
    "images arrive in time, and every GPU's step takes as long as the others'",
    "DeepSpeed's own Adam is not divided by R, though ZeRO divides it",
)


@dataclass(frozen=True)
class Network:
    """Of a GPU's link."""

    gbit_per_s: float
    latency_s: float

    def seconds(self, ranks: int, sent_bytes: float, calls: dict[str, float]) -> float:
        """Of a step's collectives, one after the other."""
        hops = math.ceil(math.log2(ranks)) if ranks > 1 else 0
        rounds = sum(count * (2 if kind == "all_reduce" else 1) for kind, count in calls.items())
        return sent_bytes * 8 / (self.gbit_per_s * 1e9) + rounds * hops * self.latency_s


@dataclass(frozen=True)
class Payload:
    """What the collectives of a step carry."""

    constant: float
    """Bytes that do not depend on the batch."""
    per_image: float
    """Bytes for each image of the global batch."""
    calls: dict[str, float]
    """Collectives a step, by kind."""

    @classmethod
    def fitted(cls, ranks: int, small: tuple[int, dict[str, Any]], large: tuple[int, dict[str, Any]]) -> "Payload":
        """small, large: global batch, and `stages.measure` of a rank with it."""
        (images, first), (more_images, second) = small, large
        payloads = [one["sent_bytes"] * ranks / (ranks - 1) for one in (first, second)]
        per_image = (payloads[1] - payloads[0]) / (more_images - images)
        return cls(payloads[0] - per_image * images, per_image, first["calls"])

    def sent_bytes(self, ranks: int, images: int) -> float:
        """By a rank in a step of so many images in the global batch."""
        return (ranks - 1) / ranks * (self.constant + self.per_image * images)


@dataclass(frozen=True)
class Worker:
    """Seconds of a worker's step, as ASSUMPTIONS say."""

    fixed_s: float
    image_s: float
    pair_s: float
    logit_s: float
    table_s: float

    def seconds(self, ranks: int, images: int) -> float:
        """images: B."""
        own = images / ranks
        return self.fixed_s + (self.image_s + self.pair_s * images + self.logit_s) * own + self.table_s / ranks


@dataclass(frozen=True)
class Counted:
    """FLOPs of a step on one worker, and the bytes of its tables that Adam passes over."""

    per_image: float
    per_pair: float
    """Of an image of the rank with one of the batch."""
    logits_per_image: float
    """Against all N identities."""
    table_bytes: float

    @classmethod
    def fitted(cls, few: dict[int, int], images: int, many: int, table_bytes: float) -> "Counted":
        """few: FLOPs by batch, of three, at few identities; many: at N, with `images`."""
        per_pair, per_image, _ = np.polyfit(list(few), list(few.values()), 2).tolist()
        return cls(per_image, max(per_pair, 0.0), (many - few[images]) / images, table_bytes)

    def on_gpu(self, tflops: float, memory_gb_s: float) -> Worker:
        """A worker that the figures of a GPU describe."""
        return self._worker(0.0, 1 / (tflops * 1e12), self.logits_per_image, self.table_bytes / (memory_gb_s * 1e9))

    def worker(self, few: dict[int, float], images: int, many_s: float) -> Worker:
        """As measured. few: seconds of a step by batch, of two, at few identities; many_s: at N, with `images`."""
        work = {batch: self.per_image * batch + self.per_pair * batch**2 for batch in few}
        small, large = sorted(few)
        flop_s = max((few[large] - few[small]) / (work[large] - work[small]), 0.0)
        added_s = max(many_s - few[images], 0.0)
        logits_s = min(self.logits_per_image * images * flop_s, added_s)
        logits = logits_s / images / flop_s if flop_s else 0.0
        return self._worker(max(few[large] - work[large] * flop_s, 0.0), flop_s, logits, added_s - logits_s)

    def _worker(self, fixed_s: float, flop_s: float, logits: float, table_s: float) -> Worker:
        return Worker(fixed_s, self.per_image * flop_s, self.per_pair * flop_s, logits * flop_s, table_s)


def predicted(
    stage: int, worker: Worker, payload: Payload, network: Network, *, images: int, weak: bool, most_ranks: int
) -> Iterator[dict[str, Any]]:
    """A row for 1, 2, 4 … GPUs. images: of the global batch; with `weak` of each GPU."""
    alone_s = worker.seconds(1, images)
    for ranks in (2**power for power in range(most_ranks.bit_length())):
        global_images = images * ranks if weak else images
        computing_s = worker.seconds(ranks, global_images)
        sent = payload.sent_bytes(ranks, global_images)
        network_s = network.seconds(ranks, sent, payload.calls)
        ideal_s = alone_s if weak else alone_s / ranks
        yield {
            "stage": stage,
            "gpus": ranks,
            "global_batch": global_images,
            "computing_ms": round(computing_s * 1e3, 3),
            "network_ms": round(network_s * 1e3, 3),
            "step_ms": round((computing_s + network_s) * 1e3, 3),
            "sent_bytes": round(sent),
            "efficiency": round(ideal_s / (computing_s + network_s), 3),
            "efficiency_overlapped": round(ideal_s / max(computing_s, network_s), 3),
        }
