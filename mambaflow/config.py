"""What a run is: frozen, validated dataclasses, the two architectures, and recipes as functions."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

from mambaflow.checks import (
    lookup,
    require,
    require_not_negative,
    require_positive,
    require_seed,
    require_share,
    require_types,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. Every idea beyond the plain baseline is one field, so that it can be ablated."""

    # The tokens and their scan. Defaults are V2's; what V1 has otherwise stands in ARCHITECTURES.
    d_model: int = 256
    """Width of a token."""
    num_layers: int = 8
    """Mamba layers in all; a bidirectional encoder splits them into two halves."""
    bidirectional: bool = True
    """Half of the layers read forward, half backward, outputs concatenated and projected."""
    scan: Literal["known", "append", "joint"] = "known"
    """Who passes through the scan: the known pixels alone, the queries after them, or all in
    one order along the curve."""
    curve: Literal["raster", "hilbert"] = "hilbert"
    """Order of the tokens in the scan, for any coordinates at any resolution."""
    d_state: int = 16
    """Numbers of state per channel of the scan."""
    d_conv: int = 4
    """Taps of the causal convolution before the scan."""
    expand: int = 2
    """Channels of the scan per channel of the token."""
    # How queries read what was scanned.
    readout: Literal["cross_attention", "perceiver"] = "perceiver"
    """How queries read the known pixels: one cross-attention, or iterations of cross-attention,
    query self-attention and MLP."""
    perceiver_iterations: int = 2
    """Iterations of the perceiver."""
    query_attention: bool = True
    """Queries of the perceiver hear one another's noisy colours."""
    num_heads: int = 8
    """Heads of every attention."""
    mlp_ratio: int = 4
    """Width of the MLP over d_model."""
    # How places and times become numbers.
    frequencies: int = 64
    """Fourier features of a coordinate pair."""
    max_frequency: float = 16.0
    """Highest spatial frequency in cycles per image; 16 is Nyquist's at 32 pixels."""
    time_scale: float = 1000.0
    """t in [0, 1] is multiplied by this before its sinusoids."""
    modulation: Literal["add", "adaln"] = "adaln"
    """How time enters: added to the query tokens, or scale, shift and gate of every sublayer."""
    # Ideas that can be taken away one by one; V1 has none of the last three.
    residual: bool = True
    """The noisy query reaches the output past the attention, not only through it."""
    windows: bool = True
    """Gaussian windows of learned width in attention, and known colours among its values."""
    local_linear: bool = True
    """A known pixel enters the scan with planes fitted to the known colours around it."""
    start: Literal["plain", "gaussian", "process"] = "process"
    """The network predicts the velocity, or a correction to the exact answer for a simple law
    around a fill of the known pixels: independent Gaussians, or a Gaussian process that also the
    noise is drawn from."""
    # How places and colours are written; the batches follow (see data.batches.Layout).
    coordinates: Literal["centre", "corner"] = "centre"
    """Where a pixel is: (i + 1/2) / size, or i / (size - 1)."""
    rgb_low: float = -1.0
    """Colours are in [rgb_low, 1]: -1 centres them on the noise, 0 does not."""

    def __post_init__(self) -> None:
        # First: the rules below compare, and text from JSON would be a TypeError there.
        require_types(self)
        require_positive(self, "d_model", "num_layers", "d_state", "d_conv", "expand", "num_heads")
        require_positive(self, "perceiver_iterations", "mlp_ratio", "frequencies", "max_frequency")
        require_positive(self, "time_scale")
        # The cures are the widths on either side; one of 0 is none, hence `or heads`.
        heads, width = self.num_heads, self.d_model
        require(
            width % heads == 0,
            f"d_model (={width}) must be divisible by num_heads (={heads}); "
            f"use {width - width % heads or heads} or {width + heads - width % heads}",
        )
        require(
            not (self.bidirectional and self.num_layers % 2),
            f"num_layers (={self.num_layers}) must be even when bidirectional, half forward and "
            f"half backward; use {self.num_layers + 1}",
        )
        # Colours are mapped to [0, 1] by dividing by 1 - rgb_low.
        require(
            -math.inf < self.rgb_low < 1,
            f"rgb_low (={self.rgb_low}) must be a number below 1, the top; use -1 or 0",
        )
        # In the other scans the queries carry the time through the scan themselves.
        require(
            self.modulation == "add" or self.readout == "perceiver" or self.scan != "known",
            f"modulation (={self.modulation!r}) needs a read-out that it modulates, and "
            f"{self.readout!r} would never hear the time; use modulation='add', or "
            "readout='perceiver'",
        )
        require(
            # The fill and its features are computed once, from the known pixels; a scan that mixes
            # queries in is computed at every call, since it hangs on their noisy colours.
            self.start == "plain" or self.scan == "known",
            f"start (={self.start!r}) needs a fill of the known pixels alone, and scan "
            f"(={self.scan!r}) mixes the queries in; use start='plain' or scan='known'",
        )


ARCHITECTURES: dict[str, ModelConfig] = {
    "v1": ModelConfig(
        d_model=512,
        num_layers=6,
        bidirectional=False,
        scan="append",
        curve="raster",
        readout="cross_attention",
        modulation="add",
        windows=False,
        local_linear=False,
        start="plain",
    ),
    "v2": ModelConfig(),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the network is trained and watched."""

    # The optimiser. Epochs, batch and rate are those of `mission`.
    epochs: int = 1000
    """Passes over the training images."""
    max_steps: int = 0
    """Steps after which the run ends even so, and its learning rate is 0; 0: when epochs end."""
    batch_size: int = 64
    """Images in a step, over all workers together."""
    lr: float = 1e-4
    """Peak learning rate: linear warm-up, then a cosine to zero."""
    warmup_steps: int = 200
    """Steps of the warm-up; a fiftieth of the run at most."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.999
    """Decay of the weights' exponential average (EMA): its weights are the ones
    evaluated; ramped up from 0."""
    # The loss: at which times, and of what.
    share_at_zero: float = 0.1
    """Share of each batch at t = 0, where the posterior mean is trained."""
    time_law: Literal["uniform", "logit_normal"] = "uniform"
    """Law of the other times."""
    weighting: Literal["velocity", "data"] = "data"
    """Loss on the velocity, or on the data implied by it, weighted by 1 / max(1 - t, 0.1)."""
    # The pixels of a batch.
    masks: Literal["strict", "fresh"] = "strict"
    """strict: the staged pixels only, 60 % of each image is never seen; fresh: new masks every
    epoch, from shards staged with --full-images."""
    min_queries: int = 0
    """Fewest queries asked in a step, drawn per step; 0: always max_queries."""
    max_queries: int = 0
    """Most queries asked in a step; 0: as many as the shards hold targets."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the matrix products; weights, optimiser and scan stay in fp32."""
    seed: int = 0
    """Seed of the weights, the order of the images, the times and the noise."""
    # What is looked at on the way, and at the end.
    log_every: int = 20
    """Steps between points of the training curves."""
    eval_every: int = 1000
    """Steps between validations; each also saves a checkpoint."""
    eval_images: int = 256
    """Validation images scored each time, drawn from all."""
    test_images: int = 512
    """Test images scored once, at the end, drawn from all; 0: the test split is left alone."""
    sample_steps: int = 16
    """Heun steps of the samples in validation, in pictures and in the final table."""

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "epochs", "batch_size", "lr", "grad_clip", "log_every", "eval_every")
        require_positive(self, "eval_images", "sample_steps")
        require_share(self, "ema_decay", "share_at_zero")
        require_not_negative(self, "warmup_steps", "weight_decay", "min_queries", "max_queries")
        require_not_negative(self, "test_images", "max_steps")
        require_seed(self, "seed")
        require(
            # Also where max_queries is 0: how many targets that stands for is not known here.
            self.min_queries <= self.max_queries,
            f"min_queries (={self.min_queries}) must be at most max_queries "
            f"(={self.max_queries}); give both, such as 100 and 820",
        )


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Where the work runs."""

    num_workers: int = 1
    """Workers, one for each GPU or each share of the cores."""
    min_workers: int = 0
    """Go on with as few as this while nodes are missing; 0: never fewer than num_workers."""
    use_gpu: bool = False
    """One GPU for each worker (NCCL); without: CPU (Gloo)."""
    threads: int = 0
    """Threads of a worker on CPU; 0: its share of the node's cores. The last bits of a run on CPU
    depend on it."""
    ray: bool = True
    """Train through Ray Train; --no-ray: in this process, or in those that torchrun started."""
    max_failures: int = 3
    """Times that lost workers are replaced before the run fails."""
    compile: Literal["off", "on", "graphs"] = "off"
    """torch.compile of the network, a minute or two at the start: on, or graphs, which also
    records a step's kernels as CUDA graphs and needs a GPU and one number of queries. Every node
    needs a C++ compiler."""

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "num_workers")
        require(
            0 <= self.min_workers <= self.num_workers,
            f"min_workers (={self.min_workers}) must be in [0, num_workers (={self.num_workers})]",
        )
        require_not_negative(self, "max_failures", "threads")
        require(
            # Whether a GPU is there is asked of the machine that trains (see training.preflight).
            self.compile != "graphs" or self.use_gpu,
            "compile (='graphs') needs a GPU; use --use-gpu, or --compile on",
        )

    @property
    def world_sizes(self) -> range:
        """Every number of workers that the run may have."""
        # An elastic run may go on with any of these after a node is lost or found.
        return range(self.min_workers or self.num_workers, self.num_workers + 1)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, written beside it as config.json."""

    arch: str = "v2"
    """Architecture whose defaults the model fields start from: v1 or v2."""
    recipe: str = "mission"
    """Where the other defaults come from: mission (1000 epochs at full size) or first-run (a small
    model, minutes on two cores)."""
    run_name: str = ""
    """Folder of the run under --storage; empty: the architecture and the time."""
    storage: str = "runs"
    """Where runs are kept: a folder or s3://bucket/prefix."""
    data: str = "sample"
    """Staged shards (a folder or s3://…), or the name of a data set to stage first: sample,
    cifar10."""
    resume: bool = False
    """Go on from the newest checkpoint of this run name."""
    take_over: bool = False
    """With --resume: take the run from a process that still trains it, which then ends."""
    init_from: str = ""
    """Start from the weights of another run's best checkpoint (its folder or s3://…), with a fresh
    optimiser; empty: from weights drawn by the seed."""
    command: Annotated[str, tyro.conf.Suppress] = ""
    """The command line, for the captions of tables."""
    data_hash: Annotated[str, tyro.conf.Suppress] = ""
    """What the data hold, wherever they are (see `data.shard_reader.data_hash`); empty: they have
    not been looked at."""
    init_hash: Annotated[str, tyro.conf.Suppress] = ""
    """What the weights of `init_from` are, wherever they are; empty: they have not been looked
    at."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)

    def __post_init__(self) -> None:
        require_types(self)
        # RECIPES stands below, since recipes make this class; it is looked up when a run is made.
        lookup(ARCHITECTURES, self.arch, "arch")
        lookup(RECIPES, self.recipe, "recipe")
        # What a path, a key in S3 or a shell would take for more than a name.
        kept = set("/\\ :*?\"'")
        bad = sorted(c for c in set(self.run_name) if c in kept or not c.isprintable())
        require(
            not bad and self.run_name not in (".", ".."),
            f"run_name (={self.run_name!r}) must be a plain folder name, without {bad}; "
            "use letters, digits, '-' and '_'",
        )
        require(
            not re.fullmatch(r"step_\d+", self.run_name),
            f"run_name (={self.run_name!r}) is what a run's checkpoints are called, and its "
            "address would be taken for one; use another name",
        )
        # Every number that an elastic run may shrink to is refused before it starts, not when it
        # does.
        for world in self.scale.world_sizes:
            _divides(self.train.batch_size, world)
        require(
            self.model.start != "process" or self.train.share_at_zero > 0,
            f"share_at_zero (={self.train.share_at_zero}) must be above 0 with start='process', "
            "whose amplitude is trained where t = 0; use 0.1, or start='gaussian'",
        )
        # min_queries of 0 stands for max_queries, and is one number of queries too.
        least, most = self.train.min_queries or self.train.max_queries, self.train.max_queries
        require(
            self.scale.compile != "graphs" or least == most,
            f"compile (='graphs') records steps of one size: min_queries (={least}) must be "
            f"max_queries (={most}); use --compile on, or --min-queries {most}",
        )


def _divides(batch_size: int, world: int) -> None:
    # A batch below `world` has no smaller neighbour that divides.
    down, up = batch_size - batch_size % world, batch_size + world - batch_size % world
    cure = f"use {down} or {up}" if down else f"use {up}"
    require(
        batch_size % world == 0,
        f"batch_size (={batch_size}) must be divisible by world size (={world}); {cure}",
    )


def mission(arch: str) -> RunConfig:
    """The run that the architecture was described with: 1000 epochs, batch 64, lr 1e-4."""
    model = lookup(ARCHITECTURES, arch, "arch")
    plain = model.start == "plain"
    return RunConfig(
        arch=arch, model=model, train=TrainConfig(weighting="velocity" if plain else "data")
    )


def first_run(arch: str) -> RunConfig:
    """A small model on the embedded sample: minutes on two cores, better than a linear fill."""
    run = mission(arch)
    model = replace(run.model, d_model=64, num_layers=4, num_heads=4)
    # The sample's 4,096 images are 512 steps: one validation on the way, and one at the end.
    train = replace(
        run.train, epochs=2, batch_size=16, lr=2e-3, warmup_steps=30, ema_decay=0.995,
        share_at_zero=0.25, masks="fresh", min_queries=100, max_queries=300, eval_every=320,
        eval_images=64, test_images=256, sample_steps=5,
    )  # fmt: skip
    return replace(run, recipe="first-run", model=model, train=train)


RECIPES: dict[str, Callable[[str], RunConfig]] = {"mission": mission, "first-run": first_run}


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    return dataclasses.asdict(config)


# What configurations that were written before call otherwise, or lack. A field that is missing and
# not named here is refused: filled in with today's default, it would silently be another run.
RENAMED = {"model": {"surroundings": "local_linear"}}
# Part -> field -> what a configuration without it meant.
ADDED: dict[str, dict[str, Any]] = {
    # data_hash: a run of before knew its data by their address alone. It goes on with whatever is
    # there, and with nothing that is elsewhere; from then on it knows what they hold.
    "a run": {"init_from": "", "take_over": False, "data_hash": "", "init_hash": ""},
    "model": {"query_attention": True},
    "train": {"max_steps": 0},
    "scale": {"threads": 0},
}
PARTS: dict[str, type] = {"model": ModelConfig, "train": TrainConfig, "scale": ScaleConfig}


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The RunConfig of `to_dict`, today's or an earlier version's, with the meaning it had.

    Raises:
        ValueError: fields that are unknown or missing, by name, or of another type.
    """
    require(isinstance(values, Mapping), f"a run (={values!r}) must hold fields by name")
    # The parts first: a run is built of them. A part that is missing is refused as one that holds
    # no fields, not filled in.
    parts = {name: _build(kind, values.get(name), name) for name, kind in PARTS.items()}
    return _build(RunConfig, {**values, **parts}, "a run")


def _build(kind: type, values: Any, part: str) -> Any:
    require(isinstance(values, Mapping), f"{part} (={values!r}) must hold fields by name")
    # Names of before become today's; then what is lacking, which a value that is there replaces.
    # Both sides of today's fields are compared: too many and too few.
    renamed = {RENAMED.get(part, {}).get(name, name): value for name, value in values.items()}
    given = ADDED.get(part, {}) | renamed
    names = {f.name for f in dataclasses.fields(kind)}
    unknown, missing = sorted(given.keys() - names), sorted(names - given.keys())
    require(not unknown, f"unknown field(s) {unknown} in {part}; valid: {sorted(names)}")
    require(
        not missing,
        f"missing field(s) {missing} in {part}: what they were is not known; "
        "use the version of mambaflow that wrote it",
    )
    # Values are checked as they are when flags bring them: by __post_init__.
    return kind(**given)


def to_json(config: RunConfig) -> str:
    """The configuration as it is written beside a run."""
    # Python's JSON writes a float so that it is read back with the same bits.
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str | bytes) -> RunConfig:
    """The configuration that `to_json` wrote."""
    return from_dict(json.loads(text))


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    """Each field in which two configurations differ, as 'model.d_model: 256 -> 128'."""
    # Of the older one's fields; both are of one class.
    for f in dataclasses.fields(old):
        a, b = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(a):
            yield from differences(a, b, f"{prefix}{f.name}.")
        elif a != b:
            yield f"{prefix}{f.name}: {a} -> {b}"
