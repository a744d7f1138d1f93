"""A training run in a second: a model of a few thousand numbers, photographs of 12 x 12 pixels."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mambaflow.config import ModelConfig, RunConfig, ScaleConfig, TrainConfig
from mambaflow.data.batches import Layout
from mambaflow.data.sample import photograph
from mambaflow.data.sources import open_source
from mambaflow.data.stage_config import StageConfig
from mambaflow.data.staging import in_process, stage
from mambaflow.models.velocity_field import VelocityField

SIZE, TRAIN, VALIDATION, TEST = 12, 40, 8, 16
MODEL = ModelConfig(
    d_model=16, num_layers=2, num_heads=2, frequencies=4, mlp_ratio=2, perceiver_iterations=1
)
FIT = TrainConfig(
    epochs=4, batch_size=8, lr=2e-3, warmup_steps=2, ema_decay=0.9, share_at_zero=0.25,
    weight_decay=0.01, log_every=4, eval_every=6, eval_images=4, test_images=4, sample_steps=1,
)  # fmt: skip
STEPS = FIT.epochs * TRAIN // FIT.batch_size
"""20 steps, validated after 6, 12, 18 and 20."""

FLAGS = [
    "--no-ray", "--d-model=16", "--num-layers=2", "--num-heads=2", "--frequencies=4",
    "--mlp-ratio=2", "--perceiver-iterations=1", "--epochs=4", "--batch-size=8", "--lr=2e-3",
    "--warmup-steps=2", "--ema-decay=0.9", "--share-at-zero=0.25", "--weight-decay=0.01",
    "--log-every=4", "--eval-every=6", "--eval-images=4", "--test-images=4", "--sample-steps=1",
]  # fmt: skip
"""The same run for the command line."""

CPU = torch.device("cpu")
LAYOUT = Layout(SIZE, known=28, target=28)  # a fifth of 144 each


@dataclass
class Asked:
    """What a velocity field needs of a batch."""

    known_xy: Tensor
    known_rgb: Tensor
    query_xy: Tensor


def stirred(config: ModelConfig) -> VelocityField:
    """A model none of whose weights is zero, as after training."""
    torch.manual_seed(0)
    model = VelocityField(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def images(folder: Path) -> Path:
    """A folder of pictures by class, cut from photographs; training and test from other ones."""
    cuts = {"train": ("coffee.png", TRAIN + VALIDATION), "test": ("chelsea.png", TEST)}
    for split, (name, count) in cuts.items():
        picture = photograph(name)
        for i in range(count):
            top, left = 4 * SIZE * (i // 8), 4 * SIZE * (i % 8)
            crop = picture[top : top + 4 * SIZE, left : left + 4 * SIZE]
            small = crop.reshape(SIZE, 4, SIZE, 4, 3).mean((1, 3)).astype(np.uint8)
            path = folder / split / "any" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(small).save(path)
    return folder


def staged(folder: Path, **settings: object) -> Path:
    """The pictures as shards of 16 rows."""
    source = images(folder / "images")
    defaults = {"size": SIZE, "validation": VALIDATION, "full_images": True, "rows_per_shard": 16}
    config = StageConfig(
        source=str(source), out=str(folder / "shards"), ray=False, **{**defaults, **settings}
    )
    stage(config, open_source(str(source)), in_process(open_source(str(source))))
    return folder / "shards"


def run_config(data: Path, storage: Path, name: str, **train: object) -> RunConfig:
    """The run."""
    fit = TrainConfig(**{**vars(FIT), **train})
    return RunConfig(
        run_name=name, storage=str(storage), data=str(data), model=MODEL, train=fit,
        scale=ScaleConfig(ray=False),
    )  # fmt: skip
