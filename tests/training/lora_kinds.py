"""Layers of LoRA files in each way that files have them, and what they change."""

import math

import torch

LINEAR, OTHER, CONVOLUTION = (
    "lora_unet_input_blocks_4_1_proj_in",
    "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_out_0",
    "lora_unet_input_blocks_2_0_in_layers_2",
)


class Drawn:
    """Random tensors of a layer in each way that LoRA files have, and the change of the weight that they stand for."""

    def __init__(self, seed: int = 0):
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)

    def lora(self, out: int = 12, inputs: int = 8, rank: int = 4, alpha: float | None = 2) -> tuple[dict, torch.Tensor]:
        up, down = self.random(out, rank), self.random(rank, inputs)
        scale = 1 if alpha is None else alpha / rank
        return _with_alpha({"lora_up.weight": up, "lora_down.weight": down}, alpha), scale * up @ down

    def locon(self, out: int = 12, inputs: int = 8, rank: int = 4) -> tuple[dict, torch.Tensor]:
        up, down = self.random(out, rank, 1, 1), self.random(rank, inputs, 3, 3)
        delta = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
        return _with_alpha({"lora_up.weight": up, "lora_down.weight": down}, 2), 2 / rank * delta

    def tucker(self, out: int = 12, inputs: int = 8, rank: int = 4) -> tuple[dict, torch.Tensor]:
        up, mid, down = self.random(out, rank, 1, 1), self.random(rank, rank, 3, 3), self.random(rank, inputs, 1, 1)
        delta = torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
        return _with_alpha({"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}, 2), 2 / rank * delta

    def loha(self, out: int = 12, inputs: int = 8, rank: int = 2) -> tuple[dict, torch.Tensor]:
        parts = {
            f"hada_w{n}_{end}": self.random(*size) for n in (1, 2) for end, size in (("a", (out, rank)), ("b", (rank, inputs)))
        }
        delta = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        return _with_alpha(parts, 3), 3 / rank * delta

    def loha_of_high_rank(self, out: int = 12, inputs: int = 8) -> tuple[dict, torch.Tensor]:
        """Its square is more than full rank."""
        return self.loha(out, inputs, rank=5)

    def loha_of_convolution(self, out: int = 12, inputs: int = 8, rank: int = 2) -> tuple[dict, torch.Tensor]:
        parts, delta = self.loha(out, inputs * 9, rank)
        return parts, delta.view(out, inputs, 3, 3)

    def lokr(self, out: int = 12, inputs: int = 8) -> tuple[dict, torch.Tensor]:
        """With a second factor that is a whole matrix: alpha is not used."""
        first, second = self.random(4, 2), self.random(out // 4, inputs // 2)
        return _with_alpha({"lokr_w1": first, "lokr_w2": second}, 7), _kronecker(first, second)

    def lokr_of_low_rank(self, out: int = 12, inputs: int = 8) -> tuple[dict, torch.Tensor]:
        first, left, right = self.random(4, 2), self.random(out // 4, 2), self.random(2, inputs // 2)
        return _with_alpha({"lokr_w1": first, "lokr_w2_a": left, "lokr_w2_b": right}, 5), 5 / 2 * _kronecker(first, left @ right)


def _with_alpha(parts: dict, alpha: float | None) -> dict:
    return parts if alpha is None else parts | {"alpha": torch.tensor(float(alpha))}


def _kronecker(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.cat([value * second for value in row], dim=1) for row in first])


def change_of(tensors: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """What a plain LoRA file changes in a layer, by its definition, in the shape of the weight."""
    up, down, alpha = (tensors[f"{layer}.{part}"].double() for part in ("lora_up.weight", "lora_down.weight", "alpha"))
    delta = up.flatten(1) @ down.flatten(1) * alpha / len(down)
    return delta.view(len(up), *down.shape[1:]) if math.prod(down.shape[1:]) == delta.shape[1] else delta
