"""Runs a tiny GGUF through Hugging Face transformers in float32 and returns what every stage held.

Weights are the file's, dequantized exactly by gguf-py; attention is the eager one. Widths, tying and epsilon are
read from the file; only Llama 3's scaling rule comes from the `Spec`, because a GGUF holds its result
(`rope_freqs.weight`) and the point is to hold that result to the rule.
"""

from pathlib import Path

import torch
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from fixture_specs import Spec

CLASSES = {"qwen3moe": "Qwen3Moe", "qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}
LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
OTHER_WEIGHTS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def halves_from_pairs(rows: torch.Tensor, n_head: int) -> torch.Tensor:
    """From the file's order within a head, (x0 y0 x1 y1 ...), to Hugging Face's, (x0 x1 ... y0 y1 ...); dim 0 is rows."""
    return rows.reshape(n_head, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def pairs_from_halves(rows: torch.Tensor, n_head: int) -> torch.Tensor:
    """The inverse of `halves_from_pairs`, along the last dimension: activations [T, n_head * head_dim]."""
    return rows.reshape(*rows.shape[:-1], n_head, 2, -1).transpose(-1, -2).reshape(rows.shape)


class GoldenModel:
    """A file's weights in the Hugging Face class of its architecture, with a recorder on every stage."""

    def __init__(self, spec: Spec, path: Path):
        reader = GGUFReader(path)
        self.spec = spec
        self.tensors = {
            t.name: torch.tensor(dequantize(t.data, t.tensor_type)).reshape([int(n) for n in reversed(t.shape)])
            for t in reader.tensors
        }
        self.stages: dict[str, torch.Tensor] = {}
        config = self._config(reader)
        self.model = getattr(transformers, CLASSES[spec.arch] + "ForCausalLM")(config).eval()
        missing, unexpected = self.model.load_state_dict(self._state_dict(), strict=False)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        assert set(missing) <= tied and not unexpected, (missing, unexpected)
        self._check_rope_divisors()
        self._record()

    def _config(self, reader: GGUFReader) -> transformers.PreTrainedConfig:
        def value(key, default=None):
            field = reader.fields.get(f"{self.spec.arch}.{key}")
            return field.contents() if field else default

        rope = {"rope_type": "default", **self.spec.rope_scaling}
        rope["rope_theta"] = value("rope.freq_base", self.spec.default_rope_base)
        n_embd, n_head = value("embedding_length"), value("attention.head_count")
        options = dict(
            vocab_size=self.tensors["token_embd.weight"].shape[0],
            hidden_size=n_embd,
            num_hidden_layers=value("block_count"),
            num_attention_heads=n_head,
            num_key_value_heads=value("attention.head_count_kv"),
            head_dim=value("attention.key_length", n_embd // n_head),
            intermediate_size=value("feed_forward_length"),
            rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
            max_position_embeddings=value("context_length"),
            tie_word_embeddings="output.weight" not in self.tensors,
            rope_parameters=rope,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            attn_implementation=RECORDING,
            dtype=torch.float32,
        )
        if self.spec.n_expert:
            options |= dict(
                num_experts=value("expert_count"),
                num_experts_per_tok=value("expert_used_count"),
                moe_intermediate_size=value("expert_feed_forward_length"),
                norm_topk_prob=True,
                experts_implementation="eager",
            )
        return getattr(transformers, CLASSES[self.spec.arch] + "Config")(**options)

    def _state_dict(self) -> dict[str, torch.Tensor]:
        state = {theirs: self.tensors[ours] for ours, theirs in OTHER_WEIGHTS.items() if ours in self.tensors}
        heads = {"attn_q": self.spec.n_head, "attn_k": self.spec.n_head_kv}
        for name, tensor in self.tensors.items():
            if not name.startswith("blk."):
                continue
            _, layer, stem, kind = name.split(".")
            if stem in LAYER_WEIGHTS:
                if self.spec.rotates_pairs and stem in heads:
                    tensor = halves_from_pairs(tensor, heads[stem])
                state[f"model.layers.{layer}.{LAYER_WEIGHTS[stem]}.{kind}"] = tensor
        for layer in range(self.spec.n_layer if self.spec.n_expert else 0):
            gate, up, down = (self.tensors[f"blk.{layer}.ffn_{p}_exps.weight"] for p in ("gate", "up", "down"))
            state[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
            state[f"model.layers.{layer}.mlp.experts.down_proj"] = down
        return state

    def _check_rope_divisors(self) -> None:
        """`rope_freqs.weight` is what transformers divides the plain frequencies by."""
        divisors = self.tensors.get("rope_freqs.weight")
        if divisors is None:
            return
        exponents = torch.arange(0, self.spec.head_dim, 2, dtype=torch.float64) / self.spec.head_dim
        plain = (self.spec.rope_base or self.spec.default_rope_base) ** -exponents
        torch.testing.assert_close(plain / divisors, self.model.model.rotary_emb.inv_freq.double(), rtol=1e-6, atol=0)

    def _record(self) -> None:
        model = self.model.model
        model.embed_tokens.register_forward_hook(lambda _m, _i, out: self._put("embedding", out))
        model.norm.register_forward_hook(lambda _m, _i, out: self._put("final_norm", out))
        self.model.lm_head.register_forward_hook(lambda _m, _i, out: self._put("lm_head", out))
        for i, layer in enumerate(model.layers):
            self._record_attention(f"blk.{i}.", layer)
            (self._record_moe if self.spec.n_expert else self._record_dense)(f"blk.{i}.", layer.mlp)

    def _record_attention(self, at: str, layer: torch.nn.Module) -> None:
        attention, parts, biased = layer.self_attn, {}, {}
        heads = {"q": self.spec.n_head, "k": self.spec.n_head_kv, "v": self.spec.n_head_kv}

        def projection(part, module, inputs, out):
            file_order = self._file_order if part in "qk" else lambda x, _n: x
            biased[part] = file_order(out, heads[part])
            parts[part] = file_order(torch.nn.functional.linear(inputs[0], module.weight), heads[part])
            if len(parts) == 3:
                self._put(at + "qkv_matmul", torch.cat([parts.pop(p) for p in "qkv"], dim=-1))
                if module.bias is not None:
                    self._put(at + "qkv_bias", torch.cat([biased.pop(p) for p in "qkv"], dim=-1))

        def scores(query, key):
            self._put(at + "q_post_rope", self._file_order(query.transpose(1, 2).flatten(2), heads["q"]))
            self._put(at + "k_post_rope", self._file_order(key.transpose(1, 2).flatten(2), heads["k"]))

        def output(_module, inputs, out):
            self._put(at + "attention", inputs[0])
            self._put(at + "attn_out", out)

        def second_norm(_module, inputs, out):
            self._put(at + "post_attn_residual", inputs[0])
            self._put(at + "ffn_norm", out)

        attention.record_scores = scores
        layer.input_layernorm.register_forward_hook(lambda _m, _i, out: self._put(at + "attn_norm", out))
        for part in "qkv":
            module = getattr(attention, part + "_proj")
            module.register_forward_hook(lambda m, i, out, part=part: projection(part, m, i, out))
        attention.o_proj.register_forward_hook(output)
        layer.post_attention_layernorm.register_forward_hook(second_norm)
        layer.register_forward_hook(
            lambda _m, _i, out: self._put(at + "post_ffn_residual", out[0] if isinstance(out, tuple) else out)
        )

    def _record_dense(self, at: str, mlp: torch.nn.Module) -> None:
        def down(_module, inputs, out):
            self._put(at + "ffn_swigl", inputs[0])
            self._put(at + "ffn_out", out)

        mlp.gate_proj.register_forward_hook(lambda _m, _i, out: self._put(at + "ffn_gate", out))
        mlp.up_proj.register_forward_hook(lambda _m, _i, out: self._put(at + "ffn_up", out))
        mlp.down_proj.register_forward_hook(down)

    def _record_moe(self, at: str, mlp: torch.nn.Module) -> None:
        def router(_module, _inputs, out):
            for stage, value in zip(("moe_router_logits", "moe_router", "moe_router_indices"), out, strict=True):
                # The router flattens [batch, T, n_embd] to rows; give the batch its dimension back.
                self._put(at + stage, value.reshape(self.batch, -1, value.shape[-1]))

        mlp.gate.register_forward_hook(router)
        mlp.register_forward_hook(
            lambda _m, _i, out: self._put(at + "moe_ffn_out", out[0] if isinstance(out, tuple) else out)
        )

    def _file_order(self, rows: torch.Tensor, n_head: int) -> torch.Tensor:
        return pairs_from_halves(rows, n_head) if self.spec.rotates_pairs else rows

    def _put(self, name: str, value: torch.Tensor) -> None:
        self.stages[name] = value.detach().clone()

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every stage of a pass over `tokens` [batch, T], each [batch, T, width]."""
        self.stages, self.batch = {}, tokens.shape[0]
        self.model(tokens, use_cache=False)
        return self.stages


RECORDING = "recording"


def recording_attention(module, query, key, value, attention_mask, scaling, **_options):
    """Eager attention, written out: softmax(q k^T * scaling + mask) v, with the rotated q and k recorded.

    query [batch, n_head, T, head_dim], key and value [batch, n_head_kv, T, head_dim]; result [batch, T, n_head, head_dim].
    """
    module.record_scores(query, key)
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    weights = torch.softmax(query @ key.transpose(2, 3) * scaling + attention_mask, dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(RECORDING, recording_attention)
AttentionMaskInterface.register(RECORDING, eager_mask)
