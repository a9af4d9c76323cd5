"""What calibration is given: texts, and readings of what a router would say."""

import torch
from tiny_models import tokens
from torch import Tensor

from moekv import CalibratedRouter, CalibrationConfig
from moekv.calibration.gates import Mixture, estimate
from moekv.calibration.oracle import Reading
from moekv.calibration.ridge import Sample, Sums
from moekv.experts.learned import places

WORDS = [f"w{i}" for i in range(100)]
SMALL = CalibrationConfig(length=96, samples=256, epochs=2, batch=32, sinks=2, recent=4, window=16)


def text(length: int, seed: int = 0) -> str:
    return " ".join(f"w{i % 100}" for i in tokens(1, length, seed)[0].tolist())


def texts(count: int) -> list[str]:
    return [text(70 + 5 * (i % 6), seed=i) for i in range(count)]


def planted(router: CalibratedRouter, count: int, length: int = 120) -> list[Reading]:
    """Make readings whose targets are what `router` would say."""
    generator = torch.Generator().manual_seed(3)
    layers, hidden = len(router.layers), router.hidden_size
    shape = (layers, len(router.experts) - 1, router.num_kv_heads, length)
    where = places((length,), length, torch.device("cpu"))[0].t()
    readings = []
    for _ in range(count):
        states = torch.randn(layers, length, hidden, generator=generator)
        reading = Reading(
            states,
            where,
            torch.randn(layers, router.num_kv_heads, length, generator=generator),
            torch.randn(shape, generator=generator),
            torch.zeros(layers, router.num_kv_heads, length),
        )
        reading.target = mixed_by(router, reading)
        readings.append(reading)
    return readings


def mixed_by(router: CalibratedRouter, reading: Reading) -> Tensor:
    with torch.no_grad():
        mixed, _ = Mixture(router, torch.ones(1, router.hidden_size))(estimate(router, reading))
    return mixed


def gather(
    router: CalibratedRouter, readings: list[Reading], held_out: int = 0, domains: int = 2
) -> Sums:
    sums = Sums.empty(router, len(router.layers), domains)
    of = [number % domains for number in range(len(readings) - held_out)]
    for domain, reading in zip(of, readings[held_out:], strict=True):
        sums.add(reading, domain)
    sums.sample = Sample(readings[held_out:], of, readings[:held_out])
    return sums
