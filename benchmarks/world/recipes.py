"""The recipes that are compared: each differs from the base recipe, the product's defaults, in one factor."""

from dataclasses import dataclass, field

from benchmarks.world import product


@dataclass(frozen=True)
class Arm:
    """A recipe; what it does not say is the default."""

    name: str
    settings: dict[str, object] = field(default_factory=dict)
    """Of the training stage."""
    captions: dict[str, object] = field(default_factory=dict)
    """Of the caption stage."""
    rate: float = 1.0
    """The learning rate, as a multiple of the base recipe's."""
    images: int = 25
    samples: int = product.SAMPLES_OF_A_RUN
    """Training samples of the run."""
    saves: int = 4
    """LoRA files that are measured, at even distances, the last one included."""
    seeds: int = 3
    """At most."""
    wait: int = 0
    """Its first seed comes when others have so many; long trainings come before all others."""
    peer: dict[str, object] | None = None
    """Arguments of the peer's script, which trains in the product's place."""


BASE = Arm("base")
_PICKED = {
    "VALIDATION_FRACTION": 0.2,
    "VALIDATE_EVERY_EPOCHS": 10,
    "SAMPLES": "true",
    "SAMPLE_STEPS": 20,
    "SAMPLE_EVERY_EPOCHS": 20,
}
"""What `-best` and `-recommended` are chosen from."""
_TOO_LONG = _PICKED | {"VALIDATE_EVERY_EPOCHS": 25, "SAMPLE_EVERY_EPOCHS": 50}
_PUBLISHED = {"MIN_SNR_GAMMA": 0, "NOISE_OFFSET": 0, "LORA_ALPHA": 16}
ROUNDS = {
    "first": [
        BASE,
        Arm("no min-SNR", {"MIN_SNR_GAMMA": 0}),
        Arm("no offset", {"NOISE_OFFSET": 0}),
        Arm("half the rate", rate=0.5),
        Arm("twice the rate", rate=2),
        Arm("alpha r/2", {"LORA_ALPHA": 16}),
        Arm("rank 8", {"LORA_RANK": 8}),
        Arm("traits in the captions", captions={"CAPTION_PRUNE_TRAITS": 0}),
    ],
    "second": [
        Arm("no min-SNR, no offset, half the rate, alpha r/2", _PUBLISHED, rate=0.5, wait=1),
        Arm("average", {"EMA_DECAY": 0.99}, wait=1),
        Arm("no caption dropout", {"CAPTION_DROPOUT": 0}, wait=1),
        Arm("caption dropout 0.2", {"CAPTION_DROPOUT": 0.2}, wait=1),
        Arm("prior", {"PRIOR_PRESERVATION": 1}, wait=1),
        Arm("huber", {"LOSS": "huber"}, wait=1),
        Arm("int8 base", {"BASE_QUANTIZATION": "int8"}, wait=1),
        Arm("class word pruned, too", captions={"CAPTION_PRUNE_TRAITS": 0.8}, wait=1),
        Arm("captions from prompts", captions={"CAPTION_SOURCE": "prompt"}, wait=1),
        Arm("10 images", images=10, wait=1),
        Arm("40 images", images=40, wait=1),
        Arm("attention only", {"LORA_TARGETS": "attention"}, wait=1),
        Arm("text encoders", {"TRAIN_TEXT_ENCODERS": "true", "TEXT_ENCODER_LR": 4e-5}, wait=1),
    ],
    "length": [Arm(f"{images} images, long", images=images, samples=5000, saves=10, seeds=1, wait=1) for images in (10, 25, 100)],
    "picks": [
        Arm("picks", _PICKED, samples=5000, saves=10, seeds=4, wait=-2),
        Arm("picks of too long a run", _TOO_LONG, rate=4, images=10, samples=5000, saves=10, seeds=4, wait=-2),
    ],
    "peer": [
        Arm("peer, its recipe", peer={}, seeds=1, wait=-2),
        Arm("peer, our recipe", peer={"rank": 32, "snr_gamma": 5.0, "noise_offset": 0.0357}, seeds=1, wait=-2),
    ],
}
"""By the names that `--round` takes."""
