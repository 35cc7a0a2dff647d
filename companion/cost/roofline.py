"""What a decode step costs: the roofline model of the paper's appendix I.

Per step, for batch B and T cached items per KV head, 2 bytes a value:

    FLOPs = n B (6 d f + 4 d^2 + 4 d d_kv + 4 d T) + 2 B d V
    Reads = n (6 d f + 4 d^2 + 4 d d_kv) + 2 d V  +  4 n B T d_kv        weights + KV cache, bytes

(the paper prints 4 d f in place of 4 d d_kv; only the latter gives its own 1.50e10 bytes of weights).  The step
takes max(FLOPs / peak, Reads / bandwidth).  Compression enters as T -> T / CR, in layers with full attention alone.

Layers may differ: one with a window or chunks holds at most so many items, one without attention a constant state, and
of E experts, of which a token takes k, a step reads E (1 - (1 - k/E)^B) if tokens choose evenly and independently.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One decoder layer; sizes are numbers of values, unless said otherwise."""

    weights: int  # in matrices that every token is multiplied with
    cached: int = 0  # keys and values of one token
    attended: int = 0  # multiply-adds of a token with one cached token
    limit: int | None = None  # tokens that are held at most: a sliding window or a chunk
    evicts: bool = False  # DMS can evict here: full attention with keys of each head
    state: int = 0  # bytes that a sequence holds whatever its length: linear attention, convolution, Mamba
    expert: int = 0  # in one expert's matrices
    experts: int = 0  # how many there are
    chosen: int = 0  # experts that a token takes

    def items(self, context: float, cr: float) -> float:
        """Cached tokens after ``context`` tokens."""
        return context / cr if self.evicts else min(context, self.limit or context)

    def experts_read(self, batch: float) -> float:
        """Different experts that ``batch`` tokens take, expected."""
        return self.experts * (1 - (1 - self.chosen / self.experts) ** batch) if self.experts else 0


@dataclass(frozen=True)
class Architecture:
    """The sizes that set the cost of a decoder.

    Without ``kinds``, all layers are alike: gated MLPs, and query heads that span the hidden width.
    """

    layers: int  # n
    hidden: int  # d
    mlp: int  # f
    kv_width: int  # d_kv: KV heads * head dim
    vocabulary: int  # V
    parameters: int | None = None  # all of them; None: matrices, and an embedding apart from the output layer
    kinds: tuple[tuple[int, Layer], ...] = ()  # (how many layers, of which kind)

    def __post_init__(self) -> None:
        d, d_kv = self.hidden, self.kv_width
        if not self.kinds:
            layer = Layer(3 * d * self.mlp + 2 * d * d + 2 * d * d_kv, 2 * d_kv, 2 * d, evicts=True)
            object.__setattr__(self, "kinds", ((self.layers, layer),))
        if self.parameters is None:
            matrices = sum(count * (kind.weights + kind.experts * kind.expert) for count, kind in self.kinds)
            object.__setattr__(self, "parameters", matrices + 2 * d * self.vocabulary)

    @property
    def active_parameters(self) -> int:
        """All parameters but those of the experts that a token does not take."""
        return self.parameters - sum(n * (kind.experts - kind.chosen) * kind.expert for n, kind in self.kinds)

    @classmethod
    def from_config(cls, config) -> "Architecture":
        """From a transformers configuration, as companion.cost.count does it."""
        from companion.cost.count import count

        return count(config)


@dataclass(frozen=True)
class Hardware:
    """Peak rates of one accelerator."""

    flops: float  # operations per second
    bandwidth: float  # bytes per second
    memory: float  # bytes


ARCHITECTURES = {  # of the paper's models; numbers of parameters are those that transformers counts
    "llama-3.2-1b": Architecture(16, 2048, 8192, 512, 128256, 1_235_814_400),
    "llama-3.1-8b": Architecture(32, 4096, 14336, 1024, 128256, 8_030_261_248),
    "qwen-r1-1.5b": Architecture(28, 1536, 8960, 256, 151936, 1_777_088_000),
    "qwen-r1-7b": Architecture(28, 3584, 18944, 512, 152064, 7_615_616_512),
    "qwen-r1-32b": Architecture(64, 5120, 27648, 1024, 152064, 32_763_876_352),
    "qwen2.5-7b": Architecture(28, 3584, 18944, 512, 152064, 7_615_616_512),
    "qwen3-8b": Architecture(36, 4096, 12288, 1024, 151936, 8_190_735_360),
}
# Dense bf16 rates of the SXM boards, by their data sheets; H100 as the paper has it.
H100 = Hardware(flops=989.5e12, bandwidth=3.35e12, memory=80e9)
DEVICES = {
    "a100": Hardware(flops=312e12, bandwidth=2.039e12, memory=80e9),
    "h100": H100,
    "h200": Hardware(flops=989.5e12, bandwidth=4.8e12, memory=141e9),
}


def flops(arch: Architecture, batch: int, items: float, cr: float = 1.0) -> float:
    """Operations of one decode step of ``batch`` rows after ``items`` tokens, of which evicting layers hold 1 / cr.

    A state costs as many as two products with it, read and written, would: 4 an fp32 value.
    """
    row = sum(
        n * (2 * (kind.weights + kind.chosen * kind.expert + kind.attended * kind.items(items, cr)) + kind.state)
        for n, kind in arch.kinds
    )
    return batch * (row + 2 * arch.hidden * arch.vocabulary)


def weight_bytes(arch: Architecture, batch: int = 1) -> float:
    """Bytes of weights that a step reads; only where there are experts does the batch matter."""
    values = sum(n * (kind.weights + kind.experts_read(batch) * kind.expert) for n, kind in arch.kinds)
    return 2 * (values + arch.hidden * arch.vocabulary)


def kv_bytes(arch: Architecture, batch: int, items: float, cr: float = 1.0) -> float:
    """Bytes of cache of ``batch`` rows after ``items`` tokens, states included; a step reads them all."""
    return batch * sum(n * (2 * kind.cached * kind.items(items, cr) + kind.state) for n, kind in arch.kinds)


def state_bytes(arch: Architecture, batch: int) -> int:
    """The part of ``kv_bytes`` that no number of tokens changes."""
    return batch * sum(n * kind.state for n, kind in arch.kinds)


def reads(arch: Architecture, batch: int, items: float, cr: float = 1.0) -> float:
    """Bytes that one decode step reads."""
    return weight_bytes(arch, batch) + kv_bytes(arch, batch, items, cr)


def latency(arch: Architecture, batch: int, items: float, hardware: Hardware = H100, cr: float = 1.0) -> float:
    """Seconds of one decode step if arithmetic and reading overlap perfectly."""
    return max(flops(arch, batch, items, cr) / hardware.flops, reads(arch, batch, items, cr) / hardware.bandwidth)


def kv_share(arch: Architecture, batch: int, context: float, cr: float = 1.0) -> float:
    """The cache's part of all bytes read (the paper's Fig. 9), 0..1.  Raises ValueError for a CR below 1."""
    if not cr >= 1:
        raise ValueError(f"compression ratio {cr}: must be >= 1")
    return kv_bytes(arch, batch, context, cr) / reads(arch, batch, context, cr)
