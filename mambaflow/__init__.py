"""mambaflow: complete and enlarge images from a fifth of their pixels.

    from mambaflow import SOLVERS, load_model, times_for

    model, _ = load_model("runs/first-v2")                # the best checkpoint of a run
    field = model.condition(batch)                        # known pixels and places asked
    noise = field.noise(torch.randn)                      # of the law that the field starts from
    rgb = SOLVERS["heun"](field, noise, times_for("uniform", 5))   # (b, n, 3) in [-1, 1]

The alphabet, the same in every wing:

    b batch    k known pixels    n asked pixels    d width    s state    h heads
    t          time in [0, 1]: 0 is noise, 1 is data; x_t = (1 - t) x_0 + t x_1
    velocity   x_1 - x_0 in the mean, given x_t and the known pixels
    rgb        colours in [-1, 1]; images for people and metrics are in [0, 1] or bytes
    xy         pixel centres ((i + 1/2) / size) in [0, 1], x to the right, y down
"""

from importlib import import_module

__version__ = "0.1.0"

# The names that users import from here, and where they live. They are looked up when they are asked
# for: importing mambaflow must not import torch, nor anything before Ray's environment is set.
_HOMES = {
    "ARCHITECTURES": "config",
    "EvalSet": "evaluation.complete",
    "ModelConfig": "config",
    "PixelBatch": "data.batches",
    "RunConfig": "config",
    "SOLVERS": "flow.samplers",
    "ShardSet": "data.shard_reader",
    "TrainConfig": "config",
    "VelocityField": "models.velocity_field",
    "complete": "evaluation.complete",
    "enlarge": "evaluation.enlarge",
    "heun": "flow.samplers",
    "load_model": "models.weights",
    "times_for": "flow.samplers",
}
__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'mambaflow' has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f"mambaflow.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
