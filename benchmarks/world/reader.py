"""Reads tags and identities from images of the drawn world: the judge of what a model has learned.

A small convolutional network, trained on the generator's own images, slightly spoiled as samples are.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from benchmarks.world.people import ALL_TAGS, FRAMINGS, GROUPS, HIDDEN, MARKS, TRAITS, Identity, identity_vector, visible_traits

WIDTHS = (32, 64, 128, 192)
_FILE = "reader.safetensors"


class Reader:
    """The trained network with its questions. Images are [N, 3, side, side], values 0 .. 1 or uint8."""

    def __init__(self, network: nn.Module, side: int, device: torch.device, readable: Sequence[str] = TRAITS):
        self.readable = tuple(readable)
        """Traits that the VAE of the world keeps; others cannot be read from samples."""
        self.network = network.to(device).eval().requires_grad_(False)
        self.side = side
        self.device = device

    def tags(self, images: torch.Tensor) -> torch.Tensor:
        """[N, len(ALL_TAGS)]: the probability that a tagger would name each tag, on the CPU."""
        return self._answers(images)[:, : len(ALL_TAGS)].sigmoid()

    def identity(self, images: torch.Tensor) -> torch.Tensor:
        """[N, len(TRAITS)]: the person as `people.identity_vector` has it, on the CPU. What cannot be seen is arbitrary."""
        return self._answers(images)[:, len(ALL_TAGS) :]

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What each of the four scales of the network makes of images (-1 .. 1), and its answers."""
        found, value = [], images
        for layer in self.network:
            value = layer(value)
            if isinstance(layer, _Residual):
                found.append(value)
        return [*found, value]

    @torch.no_grad()
    def _answers(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.network(normalized(part.to(self.device))).float().cpu() for part in images.split(256)])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.half().cpu().contiguous() for name, value in self.network.state_dict().items()}
        widths = [layer.out_channels for layer in self.network if isinstance(layer, nn.Conv2d)][: len(WIDTHS)]
        metadata = {"side": str(self.side), "widths": json.dumps(widths), "readable": json.dumps(self.readable)}
        save_file(weights, folder / _FILE, metadata=metadata)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "Reader":
        with safe_open(folder / _FILE, "pt") as file:
            described = {name: json.loads(value) for name, value in file.metadata().items()}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        network = built(described["side"], described["widths"])
        network.load_state_dict(weights)
        return cls(network, described["side"], torch.device(device), described.get("readable", TRAITS))


def normalized(images: torch.Tensor) -> torch.Tensor:
    """-1 .. 1, as floats."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float() * 2 - 1


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.inner(x))


def built(side: int, widths: Sequence[int] = WIDTHS) -> nn.Module:
    """The untrained network for images of `side` x `side` pixels."""
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(), _Residual(width)]
        before = width
    cells = (side // 2 ** len(widths)) ** 2
    layers += [nn.Conv2d(before, 48, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48 * cells, 384), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(384, len(ALL_TAGS) + len(TRAITS)))


def progress(seconds: float, steps: int) -> Callable[[int], float]:
    """The share of a training that is done after a number of steps: of all `steps`, or of the time if that is 0."""
    started = time.monotonic()
    return lambda count: count / steps if steps else (time.monotonic() - started) / seconds


def train_reader(
    images: torch.Tensor,
    captions: Sequence[Sequence[str]],
    identities: Sequence[Identity],
    seconds: float,
    device: torch.device,
    *,
    steps: int = 0,
    rate: float = 2e-3,
    batch: int = 256,
    widths: Sequence[int] = WIDTHS,
) -> Reader:
    """Train a reader for `seconds`, or `steps` if given, on uint8 images [N, 3, side, side] with all their tags and the people."""
    torch.manual_seed(0)
    is_cuda = device.type == "cuda"
    network = built(images.shape[-1], widths).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.02, fused=is_cuda)
    wanted = tag_targets(captions).to(device)
    people = torch.from_numpy(np.stack([identity_vector(each) for each in identities])).to(device)
    seen = torch.from_numpy(np.stack([visible_traits(each) for each in captions])).to(device, torch.float32)
    pixels = images.to(device)
    started, reported, step, done = time.monotonic(), time.monotonic(), 0, progress(seconds, steps)
    with torch.enable_grad():
        while (share := done(step)) < 1:
            chosen = torch.randint(len(pixels), (min(batch, len(pixels)),), device=device)
            inputs = spoiled(normalized(pixels[chosen])).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=is_cuda):
                answer = network(inputs).float()
            loss = F.binary_cross_entropy_with_logits(answer[:, : len(ALL_TAGS)], wanted[chosen]) * 10
            error = F.smooth_l1_loss(answer[:, len(ALL_TAGS) :], people[chosen], beta=0.3, reduction="none")
            loss = loss + (error * seen[chosen]).mean()
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, max((step + 1) / 100, share / 0.04)) * max(0.01, (1 - share) ** 1.2)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            if step % 10 == 0:
                if is_cuda:
                    torch.cuda.synchronize(device)  # so that the time of the schedule is that of the GPU
                if time.monotonic() - reported > 15:
                    reported = time.monotonic()
                    print(f"reader: step {step}, loss {loss.item():.4f}", flush=True)
    print(f"reader: {step} steps in {time.monotonic() - started:.0f} s", flush=True)
    return Reader(network, images.shape[-1], device)


def tag_targets(captions: Sequence[Sequence[str]]) -> torch.Tensor:
    """[N, len(ALL_TAGS)]: 1 where an image has the tag."""
    index = {tag: position for position, tag in enumerate(ALL_TAGS)}
    targets = torch.zeros(len(captions), len(ALL_TAGS))
    for row, found in enumerate(captions):
        targets[row, [index[tag] for tag in found]] = 1
    return targets


def spoiled(images: torch.Tensor) -> torch.Tensor:
    """Images (-1 .. 1) with the faults of samples: blur, coarse and fine noise, other brightness and contrast; each differs."""

    def random(low: float, high: float) -> torch.Tensor:
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)

    side = images.shape[-1]
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, soft, random(-0.4, 0.8).clamp(min=0))
    small = F.interpolate(F.avg_pool2d(images, 4), size=side, mode="bilinear")
    images = torch.lerp(images, small, random(-0.8, 0.8).clamp(min=0))
    coarse = F.interpolate(torch.randn(len(images), 3, side // 8, side // 8, device=images.device), size=side, mode="bilinear")
    images = images + coarse * random(-0.04, 0.06).clamp(min=0) + torch.randn_like(images) * random(-0.05, 0.08).clamp(min=0)
    return (images * random(0.96, 1.04) + random(-0.03, 0.03)).clamp(-1, 1)


def attribute_accuracy(asked: Sequence[Iterable[str]], probabilities: torch.Tensor, *, complete: bool = False) -> dict[str, float]:
    """The share of attributes that an image shows as it was asked to: for each of people.GROUPS that occurs, and "overall".

    A group counts in an image whose tags name one of its members; the likeliest member is what the image shows. If the tags are
    `complete`, so does what their absence says: that it is day, and that a mark that could be seen is not there.
    """
    index = {tag: position for position, tag in enumerate(ALL_TAGS)}
    values = probabilities.float().cpu().numpy()
    right: dict[str, list[bool]] = {group: [] for group in GROUPS}
    for tags, row in zip(asked, values, strict=True):
        tags = set(tags)
        for group, members in GROUPS.items():
            named = [member for member in members if member in tags]
            if not named and not (complete and _absence_tells(group, tags)):
                continue
            shares = row[[index[member] for member in members]]
            shown = members[int(shares.argmax())]
            if len(members) == 1 or group == "light":
                shown = shown if shares.max() > 0.5 else None
            right[group].append(shown == (named[0] if named else None))
    found = {group: float(np.mean(each)) for group, each in right.items() if each}
    everything = [each for several in right.values() for each in several]
    return found | {"overall": float(np.mean(everything)) if everything else float("nan")}


def _absence_tells(group: str, tags: set[str]) -> bool:
    if group == "light":
        return True
    hidden = set().union(*(HIDDEN[framing] for framing in FRAMINGS if framing in tags))
    return group in {"blunt bangs", "dark skin", *MARKS} and group not in hidden


def identity_error(
    identities: torch.Tensor, read: torch.Tensor, captions: Sequence[Iterable[str]], readable: Sequence[str] = TRAITS
) -> torch.Tensor:
    """[N]: the root mean square distance over the `readable` traits that can be seen in images with these tags."""
    counted = np.isin(TRAITS, list(readable))
    seen = torch.from_numpy(np.stack([visible_traits(each) & counted for each in captions])).float()
    return (((identities - read) ** 2 * seen).sum(1) / seen.sum(1).clamp(min=1)).sqrt()
