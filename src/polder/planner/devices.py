"""Devices and links for planning before anything is measured. A running Polder takes nothing from here: it measures its
links.

Speeds are what is sustained. Data sheets give peaks; the part of a peak that is reached is an assumption, the same for
all devices, drawn from what is expected of an H200: 4.3 of 4.8 TB/s, matrix products at 0.7 of the dense bf16 peak,
attention in prefill at 500 of 989 TFLOP/s. Own figures replace all of it: `--device memory=...,bandwidth=...,flops=...`
and `--link`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from polder.errors import ConfigError
from polder.units import parse_bytes

__all__ = [
    *(
        "ATTENTION_PART",
        "DEVICES",
        "FLOPS_PART",
        "Device",
        "Link",
        "over_ranks",
        "parse_device",
        "parse_links",
        "parse_rate",
    ),
]

MEMORY_PART, FLOPS_PART, ATTENTION_PART = 0.9, 0.7, 0.5
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kMGTP]?)(i?)(B/s|FLOP/s|)\s*")
_STEPS = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5}


@dataclass(frozen=True, kw_only=True)
class Link:
    """One way into the device."""

    name: str
    bytes_per_s: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Device:
    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    flops_per_s: float
    """Matrix products in bf16."""
    attention_flops_per_s: float
    """Attention in prefill."""
    host_link: Link | None = None
    peer_link: Link | None = None
    source: str
    """Where the figures come from, and which of them are assumed."""

    def link(self, kind: Literal["host", "peer"]) -> Link:
        """Raises ConfigError when it is not known."""
        link = self.host_link if kind == "host" else self.peer_link
        if link is None:
            raise ConfigError(f"link: the {kind} link of {self.name} is not known: give --link {kind}=55GB/s")
        return link


PCIE4 = Link(name="PCIe 4", bytes_per_s=25e9, source="measured peak of x16 (BaM, issue 54); 32 GB/s is the line rate")
PCIE5 = Link(name="PCIe 5", bytes_per_s=55e9, source="assumption: 54-55 GB/s one way of x16, whose line rate is 64")
NVLINK3 = Link(name="NVLink 3", bytes_per_s=240e9, source="12 links at 20 of 25 GB/s effective (nccl-tests, issue 149)")
NVLINK4 = Link(name="NVLink 4", bytes_per_s=380e9, source="376-390 GB/s one way measured of 450 (NCCL, issue 1264)")
NVLINK5 = Link(name="NVLink 5", bytes_per_s=760e9, source="assumption: NVLink 4's part (0.84) of 900 GB/s one way")
C2C = Link(
    name="NVLink-C2C", bytes_per_s=427e9, source="one way, measured of 450 (Oneiros, SoCC 2025); 366 with mixed traffic"
)
PCIE4_PEER = replace(PCIE4, name="PCIe 4 peer", source="assumption: as PCIe 4 to the host; no NVLink on this card")
PCIE5_PEER = replace(PCIE5, name="PCIe 5 peer", source="assumption: as PCIe 5 to the host; no NVLink on this card")

_ROWS = (  # name, GiB, peak TB/s, peak TFLOP/s (dense bf16), links, source
    ("H20", 96, 4.0, 148, PCIE4, NVLINK4,
     "96 GB, 4.0 TB/s, 148 TFLOP/s as published; PCIe 4 as in SwiftCache's servers, section 5"),
    ("H100", 80, 3.35, 989, PCIE5, NVLINK4, "published figures of the SXM part: 80 GB, 3.35 TB/s, 989 TFLOP/s"),
    ("H200", 140, 4.8, 989, PCIE5, NVLINK4,
     "published figures: 141 GB (140 GiB seen), 4.8 TB/s, 989 TFLOP/s; here 4.3 TB/s, attention at 500 TFLOP/s"),
    ("B200", 179, 8.0, 2250, PCIE5, NVLINK5, "HGX at 1 kW: 179 GB seen, 8 TB/s, 2250 TFLOP/s"),
    ("A100-80", 80, 2.039, 312, PCIE4, NVLINK3, "published figures of the SXM part: 80 GB, 2039 GB/s, 312 TFLOP/s"),
    ("A100-40", 40, 1.555, 312, PCIE4, NVLINK3, "published figures of the SXM part: 40 GB, 1555 GB/s, 312 TFLOP/s"),
    ("H100-NVL", 94, 3.9, 835, PCIE5, NVLINK4, "published figures: 94 GB, 3.9 TB/s, 835 TFLOP/s; peer link assumed"),
    ("B300", 268, 8.0, 2250, PCIE5, NVLINK5, "288 GB (268 GiB seen: assumption), 8 TB/s, 2250 TFLOP/s assumed as B200"),
    ("L4", 22, 0.3, 121, PCIE4, PCIE4_PEER, "published figures: 24 GB (22 GiB seen), 300 GB/s, 121 TFLOP/s"),
    ("A10", 22, 0.6, 125, PCIE4, PCIE4_PEER, "published figures: 24 GB (22 GiB seen), 600 GB/s, 125 TFLOP/s"),
    ("A10G", 22, 0.6, 70, PCIE4, PCIE4_PEER, "published figures: 24 GB (22 GiB seen), 600 GB/s, 70 TFLOP/s"),
    ("L40", 45, 0.864, 181, PCIE4, PCIE4_PEER,
     "published figures: 48 GB (less 1/16 for ECC: assumption), 864 GB/s, 181 TFLOP/s"),
    ("RTX3090", 24, 0.936, 71, PCIE4, PCIE4_PEER, "24 GB, 936 GB/s, 71 TFLOP/s (bf16, float32 sums)"),
    ("MI300X", 192, 5.3, 1307, PCIE5, PCIE5_PEER,
     "published figures: 192 GB, 5.3 TB/s, 1307 TFLOP/s; Polder has no backend for AMD GPUs yet"),
    ("MI325X", 256, 6.0, 1307, PCIE5, PCIE5_PEER,
     "published figures: 256 GB, 6 TB/s, 1307 TFLOP/s; Polder has no backend for AMD GPUs yet"),
    ("L40S", 45, 0.864, 362, PCIE4, PCIE4_PEER,
     "published figures: 48 GB (less 1/16 for ECC: assumption), 864 GB/s, 362 TFLOP/s"),
    ("RTX4090", 24, 1.008, 165, PCIE4, PCIE4_PEER, "24 GB, 1008 GB/s, 165 TFLOP/s (bf16, float32 sums)"),
    ("RTX5090", 32, 1.792, 209.5, PCIE5, PCIE5_PEER,
     "32 GB, 1792 GB/s; 209.5 TFLOP/s assumed: a quarter of 838 (sparse, fp16 sums)"),
    ("24GB", 24, 1.008, 165, PCIE4, PCIE4_PEER, "assumption: any card of 24 GB, with an RTX 4090's figures"),
    ("GH200", 96, 4.0, 989, C2C, NVLINK4,
     "96 GB HBM3 (Oneiros, section 5), 4 TB/s and 989 TFLOP/s as published; peer link assumed"),
)  # fmt: skip
DEVICES = {
    name: Device(
        name=name,
        memory_bytes=gib << 30,
        memory_bytes_per_s=MEMORY_PART * tb_per_s * 1e12,
        flops_per_s=FLOPS_PART * tflops * 1e12,
        attention_flops_per_s=ATTENTION_PART * tflops * 1e12,
        host_link=host,
        peer_link=peer,
        source=f"{source}; sustained {MEMORY_PART:.0%} of memory bandwidth, {FLOPS_PART:.0%} of FLOP/s: assumption",
    )
    for name, gib, tb_per_s, tflops, host, peer, source in _ROWS
}
DEVICES["H200"] = replace(DEVICES["H200"], memory_bytes_per_s=4.3e12, attention_flops_per_s=500e12)


ALIASES = {"a100": "a100-80", "gb200": "b200", "4090": "rtx4090", "3090": "rtx3090", "5090": "rtx5090"}
_NOISE = re.compile(r"nvidia|geforce|amd|instinct|tesla|[ _]|-?sxm[0-9]?|gb$")


def over_ranks(device: Device, ranks: int) -> Device:
    """So many of them as one, for a model that is split over all: without what its ranks say to each other."""
    if ranks == 1:
        return device
    wide = {
        kind: None if link is None else replace(link, bytes_per_s=ranks * link.bytes_per_s)
        for kind, link in (("host_link", device.host_link), ("peer_link", device.peer_link))
    }
    return replace(
        device,
        name=f"{ranks} x {device.name}",
        memory_bytes=ranks * device.memory_bytes,
        memory_bytes_per_s=ranks * device.memory_bytes_per_s,
        flops_per_s=ranks * device.flops_per_s,
        attention_flops_per_s=ranks * device.attention_flops_per_s,
        source=f"{device.source}; {ranks} of them, without the time of their exchanges",
        **wide,
    )


def parse_device(text: str) -> Device:
    """A name of DEVICES, or "memory=80GiB,bandwidth=3.35TB/s,flops=600T[,attention=400T]" with sustained figures.

    Attention runs at 5/7 of the FLOP/s of matrix products if it is not given, as in DEVICES. Raises ConfigError.
    """
    if "=" not in text:
        name = _NOISE.sub("", text.lower())
        devices = {name.lower(): device for name, device in DEVICES.items()}
        found = devices.get(text.lower()) or devices.get(ALIASES.get(name, name))
        if found is None:
            raise ConfigError(
                f"device: unknown {text!r}; one of {', '.join(DEVICES)}, or memory=80GiB,bandwidth=3.35TB/s,flops=600T"
            )
        return found
    given = _pairs(text, what="device", known=("memory", "bandwidth", "flops", "attention"))
    missing = [key for key in ("memory", "bandwidth", "flops") if key not in given]
    if missing:
        raise ConfigError(f"device: {text!r} lacks {', '.join(missing)}: add them")
    flops = _amount(given["flops"], "FLOP/s", what="device: flops")
    attention = given.get("attention")
    return Device(
        name="own figures",
        memory_bytes=parse_bytes(given["memory"], what="device: memory"),
        memory_bytes_per_s=parse_rate(given["bandwidth"], what="device: bandwidth"),
        flops_per_s=flops,
        attention_flops_per_s=_amount(attention, "FLOP/s", what="device: attention")
        if attention
        else flops * ATTENTION_PART / FLOPS_PART,
        source=text,
    )


def parse_links(text: str | None, device: Device) -> Device:
    """The device with these links: "55GB/s" (the host link) or "host=55GB/s,peer=380GB/s". Raises ConfigError."""
    if not text:
        return device
    given = _pairs(text if "=" in text else f"host={text}", what="link", known=("host", "peer"))
    links = {
        kind: Link(name=f"own {kind} link", bytes_per_s=parse_rate(rate, what=f"link: {kind}"), source="--link")
        for kind, rate in given.items()
    }
    return replace(device, host_link=links.get("host", device.host_link), peer_link=links.get("peer", device.peer_link))


def parse_rate(text: str, *, what: str) -> float:
    """`"3.35TB/s"` -> 3.35e12 bytes a second; GiB/s and the like are powers of 1024. Raises ConfigError naming
    `what`."""
    return _amount(text, "B/s", what=what)


def _amount(text: str, unit: str, *, what: str) -> float:
    """A number above 0 with a prefix from k to P. FLOP/s may be left out, B/s may not."""
    match = _AMOUNT.fullmatch(text)
    if match is None or float(match[1]) <= 0 or (match[4] or "FLOP/s") != unit:
        raise ConfigError(f"{what}: cannot read {text!r}; write a number above 0 and a unit, e.g. 55GB/s, 600TFLOP/s")
    return float(match[1]) * float((1024 if match[3] else 1000) ** _STEPS[match[2]])


def _pairs(text: str, *, what: str, known: tuple[str, ...]) -> dict[str, str]:
    given: dict[str, str] = {}
    for pair in text.split(","):
        key, found, value = pair.partition("=")
        if not found or key.strip() not in known:
            raise ConfigError(f"{what}: cannot read {pair!r}; write {'=..., '.join(known)}=...")
        given[key.strip()] = value.strip()
    return given
