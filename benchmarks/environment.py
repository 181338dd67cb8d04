"""What a figure was measured on and with: versions, processor or GPU, threads, commit, date."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparse_rcnn import doctor
from sparse_rcnn.weights.atomic import atomic_write

ROOT = Path(__file__).resolve().parent.parent
FALLBACK_CACHE = 64 * 2**20  # bytes: assumed where the system does not name its last-level cache


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """The record that stands in every JSON file of figures."""
    commit, dirty = _revision()
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        **doctor.versions(),
        "platform": platform.platform(),
        "processor": doctor.processor()["name"],
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # of others, when it began
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["gpu"] = properties.name
        record["compute_capability"] = f"{properties.major}.{properties.minor}"
    return record


def last_level_cache(device: torch.device) -> int:
    """Bytes of the cache that stands before the memory: L2 of a GPU, the outermost level of a processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()).groups()
        sizes.append(int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit])
    return max(sizes, default=FALLBACK_CACHE)


def write_json(path: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Write ``report`` as an indented JSON file, in one piece or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")


def write_sections(path: str | os.PathLike[str], **sections: Any) -> None:
    """Write these entries of a JSON file of figures, and leave its others as they are."""
    path = Path(path)
    others = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**others, **sections})


def _revision() -> tuple[str | None, bool | None]:
    """The commit, and whether the tree differs from it in more than figures; (None, None) outside a repository.

    A tree that was copied without its repository is told its commit by BENCHMARK_COMMIT.
    """
    git = ("git", "-C", str(ROOT))
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCHMARK_COMMIT"), None
    return head, bool(changes.stdout.strip())
