"""The models under fixtures/arch: one `Spec` per file, chosen so that each file shows what the others cannot.

Widths are as small as quant blocks of 32 allow, because all files together stay below 400 KB. A file that shows
its architecture (`qwen3moe-odd`, `qwen3`, `qwen2`, `llama`) keeps every stage of a layer; a file that shows one way
of scaling the rotation keeps the stages that follow from it.
"""

from dataclasses import dataclass, field

ALL_STAGES = None
"""A `Spec.stages` entry that keeps every stage of its layer."""

ROPE_STAGES = ("q_post_rope", "k_post_rope", "attention", "post_ffn_residual")
"""What a layer keeps where its other stages are shown elsewhere: rotation, mixing, and the layer's sum."""


@dataclass(frozen=True)
class Spec:
    """One synthetic model. Widths are in elements; `stages` holds per layer the stage names the golden keeps."""

    name: str
    arch: str
    seed: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    stages: tuple
    context_length: int = 4096
    n_expert: int = 0
    n_expert_used: int = 0
    rms_eps: float = 1e-6
    tied_output: bool = True
    quant: str = "Q8_0"
    """The type of every matrix but the router's and those of `f32_tensors`, as gguf-py names it."""
    f32_tensors: tuple = ()
    """Endings of the names of matrices stored as F32."""
    rope_base: float | None = None
    """None leaves `rope.freq_base` out of the file: the architecture's default (`default_rope_base`) holds."""
    rope_scaling: dict = field(default_factory=dict)
    """In Hugging Face's words (`rope_type`, `factor`, ...). `llama3` becomes the tensor `rope_freqs.weight`."""
    n_prompt: int = 24
    n_greedy: int = 8
    n_rows: int = 2
    """The golden keeps the last `n_rows` positions of the prompt."""

    @property
    def default_rope_base(self) -> float:
        """The architecture's documented base, for a file without `rope.freq_base`; other programs may take another."""
        return 1e4 if self.arch == "llama" else 1e6

    @property
    def has_qk_norm(self) -> bool:
        return self.arch in ("qwen3", "qwen3moe")

    @property
    def has_qkv_bias(self) -> bool:
        return self.arch == "qwen2"

    @property
    def rotates_pairs(self) -> bool:
        """Whether the file stores q and k for the rotation of adjacent elements (2j, 2j+1) instead of halves."""
        return self.arch == "llama"


SPECS = (
    Spec(
        name="qwen3moe-odd", arch="qwen3moe", seed=11, stages=(ALL_STAGES,),
        n_embd=64, n_layer=1, n_head=2, n_head_kv=1, head_dim=64, n_ff=32, n_expert=12, n_expert_used=3,
    ),
    Spec(
        name="qwen3", arch="qwen3", seed=12, stages=(ROPE_STAGES, ALL_STAGES),
        n_embd=32, n_layer=2, n_head=2, n_head_kv=1, head_dim=32, n_ff=96, tied_output=False, rope_base=1e6,
    ),
    Spec(
        name="qwen3-yarn", arch="qwen3", seed=13, stages=(ROPE_STAGES,), quant="Q4_0",
        n_embd=32, n_layer=1, n_head=2, n_head_kv=1, head_dim=32, n_ff=32, rope_base=1e4, context_length=2048,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    ),
    Spec(
        name="qwen2", arch="qwen2", seed=14, stages=(ALL_STAGES,),
        n_embd=64, n_layer=1, n_head=2, n_head_kv=1, head_dim=32, n_ff=32, rope_base=1e6,
    ),
    Spec(
        name="llama", arch="llama", seed=15, stages=(ROPE_STAGES, ALL_STAGES), rms_eps=1e-5,
        n_embd=32, n_layer=2, n_head=2, n_head_kv=1, head_dim=32, n_ff=20, f32_tensors=("ffn_down.weight", "blk.1.attn_k.weight"),
    ),
    Spec(
        name="llama3-ropefreqs", arch="llama", seed=16, stages=(ROPE_STAGES,), rms_eps=1e-5, quant="Q4_0",
        n_embd=32, n_layer=1, n_head=2, n_head_kv=1, head_dim=32, n_ff=32, rope_base=1e4,
        rope_scaling={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    Spec(
        name="llama-linear", arch="llama", seed=17, stages=(ROPE_STAGES,), rms_eps=1e-5, quant="Q4_0",
        n_embd=32, n_layer=1, n_head=2, n_head_kv=1, head_dim=32, n_ff=32, rope_base=1e4,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    ),
)
