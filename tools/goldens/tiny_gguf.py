"""Writes one `Spec` as a GGUF file: metadata as published files carry it, a byte-level vocabulary, random weights.

Every tensor is drawn from its own generator, seeded by the file's seed and the tensor's name, so adding a tensor
changes no other. Standard deviations keep activations near 1 and give logits a spread of about 2.
"""

import math
import zlib
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFWriter, TokenType

from fixture_specs import Spec

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED_TOKENS = ("<think>",)
# Merges in order of rank; both parts exist before each is made. "Ġ" is GPT-2's letter for the space byte.
MERGES = (
    "Ġ t", "h e", "Ġ a", "i n", "Ġt he", "r e", "o n", "a n", "e r", "Ġa n", "Ġan d", "o u",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_letters() -> list[str]:
    """GPT-2's 256 letters for bytes, in the order its vocabulary lists them: printable bytes, then the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = len(set(range(256)) - set(printable))
    return [chr(b) for b in printable] + [chr(256 + k) for k in range(others)]


def vocabulary() -> tuple[list[str], list[TokenType]]:
    """All tokens and their types: 256 bytes, one per merge, then the special ones."""
    plain = byte_letters() + [merge.replace(" ", "") for merge in MERGES]
    tokens = [*plain, *CONTROL_TOKENS, *USER_DEFINED_TOKENS]
    types = [TokenType.NORMAL] * len(plain)
    types += [TokenType.CONTROL] * len(CONTROL_TOKENS) + [TokenType.USER_DEFINED] * len(USER_DEFINED_TOKENS)
    return tokens, types


def control_ids() -> list[int]:
    tokens, types = vocabulary()
    return [i for i, kind in enumerate(types) if kind == TokenType.CONTROL]


def llama3_frequency_divisors(spec: Spec) -> np.ndarray:
    """`rope_freqs.weight` [head_dim/2]: what divides each rotation frequency, by Llama 3.1's published rule.

    Wavelengths below the high-frequency bound stay, those above the low-frequency bound are stretched by `factor`,
    those between are blended by how many turns the original context holds.
    """
    scaling, base = spec.rope_scaling, spec.rope_base or spec.default_rope_base
    divisors = []
    for j in range(spec.head_dim // 2):
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi * base ** (2 * j / spec.head_dim))
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / (kept + (1 - kept) / scaling["factor"]))
    return np.array(divisors, dtype=np.float32)


def matrices(spec: Spec, n_vocab: int) -> list[tuple[str, tuple[int, ...], float]]:
    """Name, shape (rows first) and standard deviation of every matrix; the fan-in scaling keeps outputs near 1."""
    width, q_out, kv_out = spec.n_embd, spec.n_head * spec.head_dim, spec.n_head_kv * spec.head_dim
    # A tied embedding is also the output matrix, and its scale has to serve the logits.
    plan = [("token_embd.weight", (n_vocab, width), 2 * width**-0.5 if spec.tied_output else 1.0)]
    if not spec.tied_output:
        plan.append(("output.weight", (n_vocab, width), 2 * width**-0.5))
    experts, suffix = ((spec.n_expert,), "_exps") if spec.n_expert else ((), "")
    for i in range(spec.n_layer):
        plan += [
            (f"blk.{i}.attn_q.weight", (q_out, width), width**-0.5),
            (f"blk.{i}.attn_k.weight", (kv_out, width), width**-0.5),
            (f"blk.{i}.attn_v.weight", (kv_out, width), width**-0.5),
            (f"blk.{i}.attn_output.weight", (width, q_out), 1.5 * q_out**-0.5),
            (f"blk.{i}.ffn_gate{suffix}.weight", (*experts, spec.n_ff, width), width**-0.5),
            (f"blk.{i}.ffn_up{suffix}.weight", (*experts, spec.n_ff, width), width**-0.5),
            (f"blk.{i}.ffn_down{suffix}.weight", (*experts, width, spec.n_ff), 2 * spec.n_ff**-0.5),
        ]
        if spec.n_expert:
            plan.append((f"blk.{i}.ffn_gate_inp.weight", (spec.n_expert, width), 1.5 * width**-0.5))
    return plan


def vectors(spec: Spec) -> list[tuple[str, int, float]]:
    """Name, length and mean of every F32 vector: norm weights around 1, biases around 0."""
    plan = [("output_norm.weight", spec.n_embd, 1.0)]
    for i in range(spec.n_layer):
        plan += [(f"blk.{i}.attn_norm.weight", spec.n_embd, 1.0), (f"blk.{i}.ffn_norm.weight", spec.n_embd, 1.0)]
        if spec.has_qk_norm:
            plan += [(f"blk.{i}.attn_{p}_norm.weight", spec.head_dim, 1.0) for p in "qk"]
        if spec.has_qkv_bias:
            heads = {"q": spec.n_head, "k": spec.n_head_kv, "v": spec.n_head_kv}
            plan += [(f"blk.{i}.attn_{p}.bias", n * spec.head_dim, 0.0) for p, n in heads.items()]
    return plan


def draw_normal(spec: Spec, name: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.default_rng([spec.seed, zlib.crc32(name.encode())])
    return generator.standard_normal(shape, dtype=np.float32)


def draw_vector(spec: Spec, name: str, length: int, mean: float) -> np.ndarray:
    """Biases of deviation 0.5; norm weights that climb from 0.9 to 1.1 with noise, so that no order of them is another."""
    noise = draw_normal(spec, name, (length,))
    if mean == 0.0:
        return np.float32(0.5) * noise
    return (np.linspace(0.9, 1.1, length) + 0.1 * noise).astype(np.float32)


def add_metadata(writer: GGUFWriter, spec: Spec, n_vocab: int) -> None:
    writer.add_name(f"synthetic {spec.name}")
    writer.add_block_count(spec.n_layer)
    writer.add_context_length(spec.context_length)
    writer.add_embedding_length(spec.n_embd)
    writer.add_feed_forward_length(spec.n_ff * max(spec.n_expert_used, 1))
    writer.add_head_count(spec.n_head)
    writer.add_head_count_kv(spec.n_head_kv)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    if spec.has_qk_norm or spec.head_dim * spec.n_head != spec.n_embd:
        writer.add_key_length(spec.head_dim)
        writer.add_value_length(spec.head_dim)
    if spec.arch == "llama":
        writer.add_vocab_size(n_vocab)
        writer.add_rope_dimension_count(spec.head_dim)
    if spec.n_expert:
        writer.add_expert_count(spec.n_expert)
        writer.add_expert_used_count(spec.n_expert_used)
        writer.add_expert_feed_forward_length(spec.n_ff)
    if spec.rope_base is not None:
        writer.add_rope_freq_base(spec.rope_base)
    kind = spec.rope_scaling.get("rope_type")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(spec.rope_scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(spec.rope_scaling["original_max_position_embeddings"])
    writer.add_file_type(gguf.LlamaFileType["MOSTLY_" + spec.quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_tokenizer(writer: GGUFWriter, spec: Spec) -> None:
    tokens, types = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe" if spec.arch == "llama" else "qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(list(MERGES))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_gguf(spec: Spec, path: Path) -> None:
    """Writes the file. llama's q and k rows are drawn in the file's own order, so nothing is permuted here."""
    n_vocab, quant = len(vocabulary()[0]), gguf.GGMLQuantizationType[spec.quant]
    writer = GGUFWriter(path, spec.arch)
    add_metadata(writer, spec, n_vocab)
    add_tokenizer(writer, spec)
    if spec.rope_scaling.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_frequency_divisors(spec))
    for name, shape, deviation in matrices(spec, n_vocab):
        values = np.float32(deviation) * draw_normal(spec, name, shape)
        if name.endswith(("ffn_gate_inp.weight", *spec.f32_tensors)):
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, quant), raw_dtype=quant)
    for name, length, mean in vectors(spec):
        writer.add_tensor(name, draw_vector(spec, name, length, mean))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
