"""The options of a job, group by group; `trainer.job` puts them together and checks them against each other."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What every model has. `LlamaOptions` and `HFOptions` say the rest."""

    name: str = "model"
    """Appears in the run's default name."""
    compile: bool | None = None
    """Compile each block with ``torch.compile``. None: on a GPU yes, on CPU no."""
    loss_chunk_tokens: int = 2048
    """The head and its cross-entropy run over this many tokens at a time, so the whole logits matrix never exists."""

    def __post_init__(self) -> None:
        if self.loss_chunk_tokens < 1:
            raise ValueError(f"model.loss_chunk_tokens={self.loss_chunk_tokens}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class LlamaOptions(ModelOptions):
    """A Llama (arXiv 2302.13971, 2307.09288): RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    dim: int = 128
    ffn_dim: int = 352
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    vocab_size: int | None = None
    """None: the tokenizer's, as the data says."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dim", "ffn_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name}={value}: must be at least 1")
        for name in ("rope_theta", "norm_eps", "init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"model.{name}={getattr(self, name):g}: must be positive")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} must be divisible by model.num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim}: rotary embeddings need an even number")


@dataclass(frozen=True, kw_only=True)
class HFOptions(ModelOptions):
    """Any Hugging Face causal language model."""

    path: str = ""
    """Local folder with ``config.json`` and, unless ``from_scratch``, ``*.safetensors``."""
    from_scratch: bool = False
    """Random weights by the model's own rule instead of the folder's."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Fields of the Hugging Face config to change, as YAML values: ``model.overrides.num_hidden_layers=2``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path in ("", "???"):
            raise ValueError("model=hf needs model.path=, the local folder of a Hugging Face model")

    def config_file(self) -> Path:
        """The folder's ``config.json``; ValueError where there is none."""
        file = Path(self.path) / "config.json"
        if not file.is_file():
            raise ValueError(f"model.path={self.path!r}: there is no {file}; give a Hugging Face model's local folder")
        return file


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """A corpus of text, tokenized once into a memory-mapped cache and packed into sequences of ``train.seq_len``."""

    name: str = "stdlib"
    """Appears in the run's default name."""
    source: str = "stdlib"
    """``stdlib`` (the interpreter's own library), ``text``, ``jsonl``, ``parquet``, or ``datasets`` (Hugging Face)."""
    paths: list[str] = field(default_factory=list)
    """Files or globs (``text jsonl parquet``), or a folder or name (``datasets``). ``**`` descends into folders."""
    column: str = "text"
    """The field that holds the text (``jsonl parquet datasets``)."""
    tokenizer: str = "bytes"
    """``bytes``, a ``tokenizer.json``, or a folder (or name) of a Hugging Face tokenizer."""
    valid_fraction: float = 0.05
    """Fraction of the documents held out for validation, chosen by a hash of their content."""
    valid_paths: list[str] = field(default_factory=list)
    """Files to validate on instead; then nothing is held out of ``paths``."""
    cache_dir: str = ""
    """Where tokenized data is kept; empty: ``$XDG_CACHE_HOME/atoll``."""

    def __post_init__(self) -> None:
        sources = ("stdlib", "text", "jsonl", "parquet", "datasets")
        if self.source not in sources:
            raise ValueError(f"data.source={self.source!r}: choose one of {', '.join(sources)}")
        if self.source != "stdlib" and not self.paths:
            raise ValueError(f"data.source={self.source} needs data.paths")
        if self.source == "stdlib" and self.paths:
            raise ValueError("data.paths is not read with data.source=stdlib; set data.source=text")
        if not 0 <= self.valid_fraction < 1:
            raise ValueError(f"data.valid_fraction={self.valid_fraction}: must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    steps: int = 400
    """Optimizer steps in all, those before a resume included."""
    seq_len: int = 256
    """Tokens in a sequence."""
    global_batch_size: int = 16
    """Sequences in an optimizer step, over all workers."""
    micro_batch_size: int | None = None
    """Sequences in one forward and backward of one worker. None: ``global_batch_size / workers``."""
    clip_norm: float | None = 1.0
    """Gradients are scaled to at most this global 2-norm; None: not at all."""
    on_bad_numbers: str = "fail"
    """Of a step whose loss or gradient is no number, or a spike: ``fail`` ends the run; ``skip`` leaves its update out,
    for which every step waits until its numbers are known; ``rewind`` goes back to the newest snapshot or checkpoint,
    and on with the data after it."""
    rewinds: int = 3
    """How often ``on_bad_numbers=rewind`` goes back; the count starts anew after 100 steps without a failure."""
    loss_spike: float | None = None
    """A loss over so many times the median of the 64 before it is a bad one; None: no finite loss is."""
    seed: int = 0
    """Of the initial weights, the order of the data and every other random choice."""
    dtype: str = "auto"
    """Of compute: ``bf16`` (fp32 master weights), ``fp32``, or ``auto``: bf16 on a GPU that has it, fp32 on CPU."""
    deterministic: bool = False
    """The same bits in every run on the same kind of GPU, also after a recovery, by kernels that take longer:
    attention's backward adds in any order otherwise, and ``offload.activations=auto`` follows times, with an α that is
    0 or 1 then. On CPU the bits are the same without it, but for that α."""
    eval_every_steps: int = 100
    """Validate after every so many steps, and at the end; 0: only at the end."""
    eval_sequences: int = 128
    """Sequences of the validation split that are used."""
    sample_tokens: int = 256
    """Tokens of text generated at the end; 0: none."""

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be at least 1")
        if abs(self.seed) >= 1 << 62:
            raise ValueError(f"train.seed={self.seed}: must be below 2^62")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"train.micro_batch_size={self.micro_batch_size}: must be at least 1")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"train.clip_norm={self.clip_norm}: must be positive, or null for no clipping")
        if self.on_bad_numbers not in ("fail", "skip", "rewind"):
            raise ValueError(f"train.on_bad_numbers={self.on_bad_numbers!r}: choose fail, skip or rewind")
        if self.rewinds < 1:
            raise ValueError(f"train.rewinds={self.rewinds}: at least 1, or set train.on_bad_numbers=fail")
        if self.loss_spike is not None and self.loss_spike <= 1:
            raise ValueError(f"train.loss_spike={self.loss_spike:g}: must be above 1, or null for none")
        if self.dtype not in ("auto", "fp32", "bf16"):
            raise ValueError(f"train.dtype={self.dtype!r}: choose auto, fp32 or bf16")
        for name in ("eval_every_steps", "eval_sequences", "sample_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    root: str = "runs"
    """Folder that holds all runs; every worker must see it."""
    name: str = ""
    """This run's folder in it; empty: ``<model.name>-<data.name>``."""
    resume: str = "auto"
    """``auto``: from the newest checkpoint if there is one; ``never``: start anew, refused where the run exists;
    ``true``: there must be one; a number: from that step."""
    on_change: str = "refuse"
    """A run whose name was used with other options is refused with the difference; ``accept`` takes the new ones."""

    def __post_init__(self) -> None:
        if self.name and (Path(self.name).is_absolute() or set(self.name.split("/")) & {"", ".", ".."}):
            raise ValueError(
                f"run.name={self.name}: must be the name of a folder in run.root; for another place set run.root="
            )
        if self.resume not in ("auto", "never", "true") and not self.resume.isdigit():
            raise ValueError(f"run.resume={self.resume!r}: choose auto, never, true or the number of a step")
        if self.on_change not in ("refuse", "accept"):
            raise ValueError(f"run.on_change={self.on_change!r}: choose refuse or accept")


@dataclass(frozen=True, kw_only=True)
class LoggerOptions:
    every_steps: int = 1
    """A plain progress line after every so many steps; a terminal's live line moves with each."""
    tensorboard: bool = True
    plot: bool = True
    """Draw ``loss.png`` at each validation and at the end, and once ``memory.png``: who held the device's memory."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"logger.every_steps={self.every_steps}: must be at least 1")
