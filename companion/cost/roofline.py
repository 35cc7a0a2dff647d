"""What a decode step costs: the roofline model of the paper's appendix I.

Per step, for batch B and T cached items per KV head, 2 bytes a value:

    FLOPs = n B (6 d f + 4 d^2 + 4 d d_kv + 4 d T) + 2 B d V
    Reads = n (6 d f + 4 d^2 + 4 d d_kv) + 2 d V  +  4 n B T d_kv        weights + KV cache, bytes

(the paper prints 4 d f in place of 4 d d_kv; only the latter gives its own 1.50e10 bytes of weights).  The step
takes max(FLOPs / peak, Reads / bandwidth).  Compression enters as T -> T / CR.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """The sizes that set the cost of a decoder with gated MLPs whose query heads span the hidden width."""

    layers: int  # n
    hidden: int  # d
    mlp: int  # f
    kv_width: int  # d_kv: KV heads * head dim
    vocabulary: int  # V

    @classmethod
    def from_config(cls, config) -> "Architecture":
        """From a transformers configuration."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        kv_width = (getattr(text, "num_key_value_heads", None) or heads) * head_dim
        return cls(text.num_hidden_layers, text.hidden_size, text.intermediate_size, kv_width, text.vocab_size)


@dataclass(frozen=True)
class Hardware:
    """Peak rates of one accelerator."""

    flops: float  # operations per second
    bandwidth: float  # bytes per second
    memory: float  # bytes


ARCHITECTURES = {
    "llama-3.2-1b": Architecture(16, 2048, 8192, 512, 128256),
    "llama-3.1-8b": Architecture(32, 4096, 14336, 1024, 128256),
    "qwen-r1-1.5b": Architecture(28, 1536, 8960, 256, 151936),
    "qwen-r1-7b": Architecture(28, 3584, 18944, 512, 152064),
    "qwen-r1-32b": Architecture(64, 5120, 27648, 1024, 152064),
    "qwen2.5-7b": Architecture(28, 3584, 18944, 512, 152064),
    "qwen3-8b": Architecture(36, 4096, 12288, 1024, 151936),
}
# Dense bf16 rates of the SXM boards, by their data sheets; H100 as the paper has it.
H100 = Hardware(flops=989.5e12, bandwidth=3.35e12, memory=80e9)
DEVICES = {
    "a100": Hardware(flops=312e12, bandwidth=2.039e12, memory=80e9),
    "h100": H100,
    "h200": Hardware(flops=989.5e12, bandwidth=4.8e12, memory=141e9),
}


def flops(arch: Architecture, batch: int, items: float) -> float:
    """Operations of one decode step of ``batch`` rows that hold ``items`` each."""
    d, f, d_kv = arch.hidden, arch.mlp, arch.kv_width
    layer = 6 * d * f + 4 * d * d + 4 * d * d_kv + 4 * d * items
    return batch * (arch.layers * layer + 2 * d * arch.vocabulary)


def weight_bytes(arch: Architecture) -> float:
    """Bytes of weights that every step reads, whatever the batch: as many as a row's operations with no items."""
    return flops(arch, 1, 0)


def kv_bytes(arch: Architecture, batch: int, items: float) -> float:
    """Bytes of cache of ``batch`` rows that hold ``items`` each; a step reads them all."""
    return 4 * arch.layers * batch * items * arch.kv_width


def reads(arch: Architecture, batch: int, items: float) -> float:
    """Bytes that one decode step reads."""
    return weight_bytes(arch) + kv_bytes(arch, batch, items)


def latency(arch: Architecture, batch: int, items: float, hardware: Hardware = H100) -> float:
    """Seconds of one decode step if arithmetic and reading overlap perfectly."""
    return max(flops(arch, batch, items) / hardware.flops, reads(arch, batch, items) / hardware.bandwidth)


def kv_share(arch: Architecture, batch: int, context: float, cr: float = 1.0) -> float:
    """The cache's part of all bytes read (the paper's Fig. 9), 0..1.  Raises ValueError for a CR below 1."""
    if not cr >= 1:
        raise ValueError(f"compression ratio {cr}: must be >= 1")
    return kv_bytes(arch, batch, context / cr) / reads(arch, batch, context / cr)
